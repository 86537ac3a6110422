'use strict';
document.documentElement.classList.add('js');

// The reading of the point that is nearest to the pointer.
for (const chart of document.querySelectorAll('figure.chart')) {
  const data = chart.querySelector('script[type="application/json"]');
  if (!data) continue;
  const points = JSON.parse(data.textContent).flat();
  const svg = chart.querySelector('svg');
  const cursor = chart.querySelector('.cursor');
  const reading = chart.querySelector('.reading');
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * 360 / box.width;
    const y = (event.clientY - box.top) * 210 / box.height;
    let nearest = null, least = Infinity;
    for (const point of points) {
      const distance = (point[0] - x) ** 2 + ((point[1] - y) / 3) ** 2;
      if (distance < least) { least = distance; nearest = point; }
    }
    chart.classList.add('read');
    cursor.setAttribute('cx', nearest[0]);
    cursor.setAttribute('cy', nearest[1]);
    reading.textContent = nearest[2];
  };
  const hide = () => {
    chart.classList.remove('read');
    reading.textContent = '\u00a0';
  };
  svg.addEventListener('pointermove', show);
  svg.addEventListener('pointerdown', show);
  svg.addEventListener('pointerleave', hide);
}

// Rows of buttons of which one is pressed.
for (const group of document.querySelectorAll('.filters')) {
  group.hidden = false;
  const section = group.closest('section');
  group.addEventListener('click', (event) => {
    const chosen = event.target.closest('button');
    if (!chosen) return;
    for (const button of group.querySelectorAll('button')) {
      button.setAttribute('aria-pressed', String(button === chosen));
    }
    if (chosen.dataset.measure !== undefined) {
      section.dataset.measure = chosen.dataset.measure;
      return;
    }
    for (const item of section.querySelectorAll('.case')) {
      item.hidden = chosen.dataset.show !== 'all' && item.dataset.verdict !== chosen.dataset.show;
    }
  });
}

// Paper has nothing to click on.
let closed = [];
addEventListener('beforeprint', () => {
  closed = [...document.querySelectorAll('details:not([open])')];
  for (const part of closed) part.open = true;
});
addEventListener('afterprint', () => {
  for (const part of closed) part.open = false;
});

// A page that is followed loads itself again.
const seconds = Number(document.body.dataset.follow);
if (seconds) {
  const box = document.getElementById('follow');
  setInterval(() => { if (box.checked && !document.hidden) location.reload(); }, 1000 * seconds);
}
