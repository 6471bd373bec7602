// Buttons that copy the code beside them. Without a secure connection the browser allows no access to the clipboard:
// the code is selected instead, for Ctrl-C.
(function () {
  "use strict";
  function say(button, text) {
    button.textContent = text;
    window.setTimeout(function () { button.textContent = "Copy"; }, 2000);
  }
  function select(code, button) {
    var range = document.createRange();
    range.selectNodeContents(code);
    var selection = window.getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    say(button, "Selected");
  }
  document.querySelectorAll("button.copy").forEach(function (button) {
    var code = document.getElementById(button.dataset.copy);
    button.hidden = false;
    button.setAttribute("aria-live", "polite");
    button.addEventListener("click", function () {
      if (!navigator.clipboard) { select(code, button); return; }
      navigator.clipboard.writeText(code.textContent).then(function () { say(button, "Copied"); }, function () { select(code, button); });
    });
  });
})();
