// All the script there is: a running job's page refreshes itself, keys press what names them, a list shows its place.
"use strict";

const typing = () => {
  const at = document.activeElement;
  return Boolean(at && at.matches("input, select, textarea"));
};
const reading = () => !document.hidden && !typing() && !String(getSelection());

const seen = document.body.dataset.version;
if (seen) {
  const every = Number(document.body.dataset.everyMs);
  const look = async () => {
    try {
      if (reading()) {
        const answer = await fetch(document.body.dataset.versionAt, { cache: "no-store" });
        if (answer.ok && (await answer.json()).version !== seen && reading()) {
          location.reload();
          return;
        }
      }
    } catch {
      // The server is gone for now; it may come back.
    }
    setTimeout(look, every);
  };
  setTimeout(look, every);
}

// What has a key is pressed, followed or, where people type, gone to by that key.
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && typing()) document.activeElement.blur();
  if (typing() || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const target = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (target) {
    event.preventDefault();
    if (target.matches("input")) target.focus();
    else target.click();
  }
});

// A label is sent once, however often the key is pressed.
const review = document.querySelector("form[data-review]");
if (review) {
  review.addEventListener("submit", (event) => {
    if (review.dataset.sent) event.preventDefault();
    review.dataset.sent = "yes";
  });
}

// In a long list the chosen prompt is in sight, without moving the page.
const chosen = document.querySelector(".prompts [aria-current]");
if (chosen) {
  const list = chosen.closest(".prompts");
  list.scrollTop = chosen.offsetTop - (list.clientHeight - chosen.offsetHeight) / 2;
}
