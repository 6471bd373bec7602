// Ticks every model of the page, or none.
(function () {
  "use strict";
  var button = document.getElementById("tick-all");
  if (!button) return;
  var boxes = Array.from(document.querySelectorAll(".library .pick input"));
  function ticked() { return boxes.every(function (box) { return box.checked; }); }
  function name() { button.textContent = ticked() ? "Tick none" : "Tick all"; }
  button.hidden = false;
  button.addEventListener("click", function () {
    var tick = !ticked();
    boxes.forEach(function (box) { box.checked = tick; });
    name();
  });
  boxes.forEach(function (box) { box.addEventListener("change", name); });
  name();
})();
