// What htmx and plain HTML cannot say.
(function () {
  "use strict";

  // The embedded report is as tall as what it says.
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

  // Whoever looks at a page that is no longer kept fresh should know it. A session that has ended leads to the door.
  function away(is) { document.getElementById("away").hidden = !is; }
  document.addEventListener("htmx:sendError", function () { away(true); });
  document.addEventListener("htmx:responseError", function (event) {
    if (event.detail.xhr.status === 401) window.location.reload();
    else if (event.detail.xhr.status >= 500) away(true);
  });
  document.addEventListener("htmx:afterOnLoad", function (event) { if (event.detail.successful !== false) away(false); });

  // The same state said again every second would be read aloud every second.
  document.addEventListener("htmx:oobBeforeSwap", function (event) {
    var said = event.detail.target.id === "said";
    if (said && event.detail.target.textContent.trim() === event.detail.fragment.textContent.trim()) event.detail.shouldSwap = false;
  });
})();
