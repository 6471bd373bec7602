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

  // The draft of a recipe belongs to one entry of the browser's history: Back and reload restore it, a new page starts
  // empty, and other tabs do not see it. Pages are sent with no-store, so the browser restores nothing itself. Secrets
  // and the submission's idempotency key are not saved.
  var MOST_DRAFTS = 20, DRAFT = "draft ";
  function inputs(form) {
    return Array.from(form.elements).filter(function (one) {
      return one.name && one.type !== "password" && one.type !== "hidden";
    });
  }
  function keep(name, form) {
    var draft = {};
    inputs(form).forEach(function (one) { draft[one.name] = one.type === "checkbox" ? one.checked : one.value; });
    try { sessionStorage.setItem(name, JSON.stringify(draft)); } catch (full) { return; }
    var names = Object.keys(sessionStorage).filter(function (one) { return one.startsWith(DRAFT); }).sort();
    names.slice(0, -MOST_DRAFTS).forEach(function (one) { sessionStorage.removeItem(one); });
  }
  function restore(draft, form) {
    inputs(form).forEach(function (one) {
      if (!(one.name in draft)) return;
      if (one.type === "checkbox") one.checked = draft[one.name];
      else one.value = draft[one.name];
    });
    // htmx has not processed the page yet: its first check then uses the draft, and the form follows it
    document.getElementById("outcome").setAttribute("hx-post", "/submit/check?typed=true");
  }
  // The number beside a slider follows it while it is moved.
  document.addEventListener("input", function (event) {
    var shown = event.target.type === "range" && document.querySelector('output[for="' + event.target.id + '"]');
    if (shown) shown.textContent = event.target.value;
  });
  var editor = document.getElementById("recipe");
  if (editor) {
    var form = editor.form, name = history.state && history.state.draft;
    if (!name) history.replaceState({ draft: name = DRAFT + Date.now() }, "");
    var draft = JSON.parse(sessionStorage.getItem(name) || "null");
    if (draft) restore(draft, form);
    form.addEventListener("input", function () { keep(name, form); });
    document.addEventListener("htmx:afterSwap", function (event) {
      if (event.detail.target.id === "recipe") keep(name, form);
    });
  }
})();
