// The page New job: the choice of a model, the lines of problems, and the draft when the page is left.
(function () {
  "use strict";
  var write = document.querySelector("form.write"), state = document.getElementById("draft-state"), unsaved = false, asked = null;

  // A chosen model is written into its input, as if it had been typed.
  function choose(model) {
    var input = document.getElementById("ask-model");
    input.value = model;
    ["input", "change"].forEach(function (kind) { input.dispatchEvent(new Event(kind, { bubbles: true })); });
  }
  // Mark the model in the list that is chosen, and ask what is known of it.
  function mark() {
    var input = document.getElementById("ask-model"), known = document.getElementById("known");
    if (input && known && input.value !== asked) {
      asked = input.value;
      known.dispatchEvent(new Event("model-chosen"));
    }
    document.querySelectorAll("#models .model").forEach(function (one) {
      one.setAttribute("aria-pressed", String(Boolean(input) && one.dataset.model === input.value));
    });
  }
  document.addEventListener("click", function (event) {
    var model = event.target.closest("#models .model"), line = event.target.closest("#outcome .to-line");
    if (model) choose(model.dataset.model);
    if (line) goTo(Number(line.closest("[data-line]").dataset.line));
  });
  // What is searched for is no answer.
  var picker = document.getElementById("picker");
  if (picker) picker.addEventListener("input", function (event) { event.stopPropagation(); });
  document.addEventListener("htmx:afterSwap", mark);
  document.addEventListener("change", function (event) { if (event.target.id === "ask-model") mark(); });

  // Answers that were given after a request was sent are not in its response: such a response leaves the questions as
  // they are, and the request that follows brings them all.
  var unsent = false;
  document.addEventListener("input", function (event) { if (event.target.closest("#ask")) unsent = true; });
  document.addEventListener("htmx:beforeRequest", function (event) { if (event.target.id === "ask") unsent = false; });
  document.addEventListener("htmx:oobBeforeSwap", function (event) {
    if (unsent && event.detail.target.id === "ask") event.detail.shouldSwap = false;
  });

  // Select a line of the plain text field; editor.js does so in its editor.
  function goTo(number) {
    var area = document.getElementById("recipe");
    if (area.hidden) return;
    var lines = area.value.split("\n"), begin = lines.slice(0, number - 1).join("\n").length + (number > 1 ? 1 : 0);
    area.focus();
    area.setSelectionRange(begin, begin + (lines[number - 1] || "").length);
  }

  // The draft is stored a second after each change, and when the page is left before that.
  write.addEventListener("input", function () { unsaved = true; });
  document.body.addEventListener("composed", function () { unsaved = true; });
  state.addEventListener("htmx:beforeRequest", function (event) {
    if (write.dataset.sent) event.preventDefault();
    else unsaved = false;
  });
  write.addEventListener("submit", function (event) {
    if (event.submitter && event.submitter.hasAttribute("formaction")) return;  // to the form of a sweep
    write.dataset.sent = "yes";
    // Back then finds the job that this page has submitted, and shows its recipe.
    history.replaceState(history.state, "", "/submit?sent=" + encodeURIComponent(write.elements.key.value));
  });
  window.addEventListener("pagehide", function () {
    if (!unsaved || write.dataset.sent) return;
    var fields = new FormData(write);
    ["hub_token", "key"].forEach(function (name) { fields.delete(name); });
    navigator.sendBeacon("/submit/draft", new URLSearchParams(fields));
    unsaved = false;
  });
})();
