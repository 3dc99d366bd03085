// All the script there is: a running job's page refreshes itself, and the review takes keys.
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
        const answer = await fetch("/version", { cache: "no-store" });
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

const review = document.querySelector("form[data-review]");
if (review) {
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && typing()) document.activeElement.blur();
    if (typing() || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const button = review.querySelector(`button[data-key="${CSS.escape(event.key)}"]`);
    if (button) {
      event.preventDefault();
      button.click();
    }
  });
  // A label is sent once, however often the key is pressed.
  review.addEventListener("submit", (event) => {
    if (review.dataset.sent) event.preventDefault();
    review.dataset.sent = "yes";
  });
}
