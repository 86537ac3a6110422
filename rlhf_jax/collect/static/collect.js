'use strict';
// What the pages do beyond plain forms: dragging, number keys, drafts, previews, polling.
// Every form works without this file; it only fills in the same fields.

document.documentElement.classList.add('js');
const formToken = document.body.dataset.formToken || '';

function post(address, fields) {
  return fetch(address, {
    method: 'POST',
    headers: { 'X-Form-Token': formToken },
    body: new URLSearchParams(fields),
  });
}

// Rankings. A card's rank is the checked radio of its field; the order of the cards
// follows the ranks as soon as all cards have one, so what is seen is what is sent.
function prepareRanking(form) {
  const list = form.querySelector('[data-cards]');
  if (!list) return;
  const cards = () => [...list.querySelectorAll('.card')];
  const axes = Number(list.dataset.axes);
  form.querySelectorAll('[data-js]').forEach((part) => { part.hidden = false; });
  const isFull = () => {
    const mode = form.querySelector('input[name=mode]:checked');
    return !mode || mode.value === 'full';
  };
  const axisOf = (card) => {
    const inside = document.activeElement && document.activeElement.closest('.ranks');
    const fields = [...card.querySelectorAll('.ranks')];
    return (inside && card.contains(inside)) ? inside : fields[0];
  };
  const rankOf = (card) => {
    const checked = card.querySelector('.ranks input:checked');
    return checked && checked.value ? Number(checked.value) : null;
  };
  const setRank = (fieldset, rank) => {
    for (const radio of fieldset.querySelectorAll('input')) {
      radio.checked = radio.value === (rank === null ? '' : String(rank));
    }
  };
  const changed = () => form.dispatchEvent(new Event('input', { bubbles: true }));

  // Gives ranks 1, 2, 3 … in the order of the cards; ties that stand together stay.
  function rankByOrder(moved) {
    const before = cards().map(rankOf);
    let rank = 0;
    cards().forEach((card, place) => {
      const above = place ? cards()[place - 1] : null;
      const tied = place && before[place] !== null && before[place] === before[place - 1]
        && card !== moved && above !== moved;
      if (!tied) rank = place + 1;
      setRank(card.querySelector('.ranks'), rank);
    });
    changed();
  }

  function sortByRank() {
    if (axes !== 1 || !isFull()) return;
    const all = cards();
    if (all.some((card) => rankOf(card) === null)) return;
    const focused = document.activeElement;
    const sorted = all
      .map((card, place) => ({ card, place, rank: rankOf(card) }))
      .sort((a, b) => a.rank - b.rank || a.place - b.place);
    sorted.forEach(({ card }) => list.append(card));
    if (focused && list.contains(focused)) focused.focus();
  }

  function move(card, step) {
    const all = cards();
    const target = all[all.indexOf(card) + step];
    if (!target) return;
    if (step < 0) target.before(card); else target.after(card);
    rankByOrder(card);
    card.focus();
  }

  if (axes === 1) {
    list.querySelectorAll('.moves').forEach((part) => { part.hidden = false; });
    const sortable = window.Sortable && new window.Sortable(list, {
      handle: '.handle',
      animation: 120,
      ghostClass: 'ghost',
      onEnd: (event) => rankByOrder(event.item),
    });
    const follow = () => {
      if (sortable) sortable.option('disabled', !isFull());
      list.querySelectorAll('.moves').forEach((part) => { part.hidden = !isFull(); });
    };
    form.querySelectorAll('input[name=mode]').forEach((radio) => radio.addEventListener('change', follow));
    follow();
  } else {
    list.querySelectorAll('.handle').forEach((part) => part.remove());
  }

  list.addEventListener('click', (event) => {
    const button = event.target.closest('[data-move]');
    if (button) move(button.closest('.card'), Number(button.dataset.move));
  });
  list.addEventListener('change', (event) => {
    if (event.target.matches('.ranks input')) sortByRank();
  });
  list.addEventListener('keydown', (event) => {
    const card = event.target.closest('.card');
    if (!card || event.ctrlKey || event.metaKey || event.altKey) return;
    const onRadio = event.target.matches('input[type=radio]');
    if (/^[1-9]$/.test(event.key) && Number(event.key) <= cards().length) {
      setRank(axisOf(card), Number(event.key));
      changed();
      sortByRank();
      event.preventDefault();
    } else if ((event.key === '0' || event.key === 'Backspace') && !isFull()) {
      setRank(axisOf(card), null);
      changed();
      event.preventDefault();
    } else if (!onRadio && (event.key === 'ArrowDown' || event.key === 'ArrowUp')) {
      const step = event.key === 'ArrowDown' ? 1 : -1;
      if (event.shiftKey && axes === 1 && isFull()) {
        move(card, step);
      } else {
        const next = cards()[cards().indexOf(card) + step];
        if (next) next.focus();
      }
      event.preventDefault();
    }
  });
  sortByRank();
  if (!list.contains(document.activeElement)) cards()[0].focus({ preventScroll: true });
}

// Drafts: what is filled in is kept by the server a moment after each change.
function prepareDraft(form) {
  const state = form.querySelector('[data-draft-state]');
  let timer = null;
  let sending = false;
  form.addEventListener('submit', () => { sending = true; clearTimeout(timer); });
  form.addEventListener('input', () => {
    if (sending) return;
    clearTimeout(timer);
    timer = setTimeout(async () => {
      try {
        const answer = await post(form.dataset.draft, new FormData(form));
        if (state) state.textContent = answer.ok ? 'Draft saved' : 'Draft not saved';
      } catch (error) {
        if (state) state.textContent = 'Draft not saved: no connection';
      }
    }, 700);
  });
}

// Pastes are counted for the reviewer, and never judged.
function countPastes(form) {
  const times = form.querySelector('input[name=pastes]');
  const characters = form.querySelector('input[name=pasted_characters]');
  if (!times || !characters) return;
  form.addEventListener('paste', (event) => {
    const text = event.clipboardData ? event.clipboardData.getData('text') : '';
    times.value = Number(times.value) + 1;
    characters.value = Number(characters.value) + text.length;
  });
}

function preparePreview(box) {
  const form = box.form;
  const count = form.querySelector('[data-count]');
  const preview = form.querySelector('[data-preview-box]');
  let timer = null;
  const show = async () => {
    let answer;
    try {
      answer = await post('/preview', { text: box.value });
    } catch (error) {
      return; // the next change tries again
    }
    if (!answer.ok) return;
    const values = await answer.json();
    count.textContent = `${values.count} ${box.dataset.unit}`;
    preview.hidden = !box.value.trim();
    // the server has sanitised it
    preview.querySelector('.text').innerHTML = values.html;
  };
  box.addEventListener('input', () => { clearTimeout(timer); timer = setTimeout(show, 300); });
  show();
}

function waitForReplies(part) {
  const look = async () => {
    try {
      const answer = await fetch(part.dataset.waiting);
      if (answer.ok && (await answer.json()).state !== 'waiting') {
        window.location.reload();
        return;
      }
    } catch (error) { /* the connection may come back */ }
    setTimeout(look, 1000);
  };
  setTimeout(look, 700);
}

document.querySelectorAll('form[data-ranking]').forEach(prepareRanking);
document.querySelectorAll('form[data-draft]').forEach(prepareDraft);
document.querySelectorAll('form.answer').forEach(countPastes);
document.querySelectorAll('textarea[data-preview]').forEach(preparePreview);
document.querySelectorAll('[data-waiting]').forEach(waitForReplies);

// Ctrl+Enter sends the form; u takes the last answer back.
document.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
    const form = (document.activeElement && document.activeElement.closest('form.answer'))
      || document.querySelector('form.answer');
    const button = form && form.querySelector('button.primary');
    if (button) { event.preventDefault(); form.requestSubmit(button); }
  }
  const typing = document.activeElement && document.activeElement.matches('textarea, input[type=text]');
  if (event.key === 'u' && !typing && !event.ctrlKey && !event.metaKey) {
    const undo = document.querySelector('[data-key=u]');
    if (undo) undo.click();
  }
});
