// The embedded report is as tall as what it says. Everything else is htmx, or plain HTML.
(function () {
  "use strict";
  function fit(frame) {
    var page = frame.contentDocument && frame.contentDocument.documentElement;
    if (page) frame.height = page.scrollHeight;
  }
  document.querySelectorAll("iframe.report").forEach(function (frame) {
    frame.addEventListener("load", function () {
      fit(frame);
      new ResizeObserver(function () { fit(frame); }).observe(frame.contentDocument.body);
    });
    fit(frame);
  });
})();
