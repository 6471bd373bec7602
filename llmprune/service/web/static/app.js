// Behaviour that htmx and plain HTML do not provide.
(function () {
  "use strict";

  // The frame of the report is as tall as its contents.
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

  // Show that the page is no longer refreshed. Where the session has ended, load the sign-in page.
  function away(is) { document.getElementById("away").hidden = !is; }
  document.addEventListener("htmx:sendError", function () { away(true); });
  document.addEventListener("htmx:responseError", function (event) {
    if (event.detail.xhr.status === 401) window.location.reload();
    else if (event.detail.xhr.status >= 500) away(true);
  });
  document.addEventListener("htmx:afterOnLoad", function (event) { if (event.detail.successful !== false) away(false); });

  // Screen readers read a status aloud whenever it is replaced, so an unchanged status is not.
  document.addEventListener("htmx:oobBeforeSwap", function (event) {
    var said = event.detail.target.id === "said";
    if (said && event.detail.target.textContent.trim() === event.detail.fragment.textContent.trim()) event.detail.shouldSwap = false;
  });

  // The number beside a slider follows it while it is moved.
  document.addEventListener("input", function (event) {
    var shown = event.target.type === "range" && document.querySelector('output[for="' + event.target.id + '"]');
    if (shown) shown.textContent = event.target.value;
  });
})();
