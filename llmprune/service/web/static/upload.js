// Upload of a run's archive: drop, checks before it is sent, progress, and what is wrong with it.
(function () {
  "use strict";
  var form = document.getElementById("archive-form");
  if (!form) return;
  var file = form.elements.archive, sending = document.getElementById("sending"), bar = sending.querySelector("progress"),
    said = sending.querySelector("[role=status]"), wrong = form.querySelector(".problems"), list = wrong.querySelector("ul"),
    buttons = form.querySelectorAll(".send button"), request = null, spoken = 0;

  function size(bytes) {
    var units = ["B", "KB", "MB", "GB", "TB"], at = 0;
    while (bytes >= 1000 && at < units.length - 1) { bytes /= 1000; at += 1; }
    return (at && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)) + " " + units[at];
  }
  function time(seconds) {
    return seconds < 90 ? Math.ceil(seconds) + " s" : seconds < 5400 ? Math.ceil(seconds / 60) + " min" : (seconds / 3600).toFixed(1) + " h";
  }
  function refuse(problems) {
    ended();
    list.replaceChildren.apply(list, problems.map(function (text) {
      var line = document.createElement("li");
      line.textContent = text;
      return line;
    }));
    wrong.hidden = !problems.length;
  }
  function ended() {
    request = null;
    sending.hidden = buttons[1].hidden = true;
    buttons[0].disabled = false;
  }

  // A file that is no archive is not sent: an uncompressed one has this word in its first block.
  function check(chosen) {
    if (!chosen) return Promise.resolve("choose an archive");
    if (chosen.size > Number(form.dataset.limit)) return Promise.resolve(chosen.name + " has " + size(chosen.size) + "; an upload has at most " + size(Number(form.dataset.limit)));
    return chosen.slice(257, 262).text().then(function (word) {
      return word === "ustar" ? null : chosen.name + " is no uncompressed tar archive; choose the one that a job's page offers for download";
    }, function () { return chosen.name + " cannot be read; choose it again"; });
  }
  function send() {
    var fields = new FormData(form), begun = performance.now(), total = file.files[0].size;
    request = new XMLHttpRequest();
    request.open("POST", form.action);
    request.setRequestHeader("Accept", "application/json");
    request.responseType = "json";
    request.upload.addEventListener("progress", function (event) {
      var seconds = (performance.now() - begun) / 1000, rate = event.loaded / Math.max(seconds, .001), done = event.loaded >= event.total;
      bar.value = event.loaded / event.total;
      if (!done && seconds - spoken < 1) return;  // a screen reader reads each change
      spoken = seconds;
      said.textContent = done ? "Sent; the service checks it." : size(event.loaded) + " of " + size(total) + ", " + size(rate) + " a second, about " + time((event.total - event.loaded) / rate) + " left";
    });
    request.addEventListener("load", function () {
      var answer = this.response || {};
      if (this.status === 201) { request = null; window.location.assign(answer.location); return; }
      if (this.status === 401) { request = null; window.location.reload(); return; }
      refuse(answer.problems && answer.problems.length ? answer.problems : [answer.detail || "the service answered " + this.status + "; try again"]);
    });
    request.addEventListener("error", function () { refuse(["the connection broke off, and nothing was kept; upload it again, or use llmprune upload, which continues"]); });
    request.addEventListener("abort", function () { refuse([]); });
    bar.value = spoken = 0;
    said.textContent = "Begins.";
    sending.hidden = buttons[1].hidden = false;
    buttons[0].disabled = true;
    request.send(fields);
  }

  form.addEventListener("submit", function (event) {
    event.preventDefault();
    if (request) return;
    refuse([]);
    check(file.files[0]).then(function (problem) { if (problem) refuse([problem]); else send(); });
  });
  buttons[1].addEventListener("click", function () { if (request) request.abort(); buttons[0].focus(); });
  window.addEventListener("beforeunload", function (event) { if (request) event.preventDefault(); });

  // A file may be dropped anywhere on the page.
  var around = form.closest(".upload"), over = 0;
  function hasFile(event) { return !request && event.dataTransfer && Array.from(event.dataTransfer.types).indexOf("Files") >= 0; }
  function show(number) { over = Math.max(0, number); around.classList.toggle("dropping", over > 0); }
  document.addEventListener("dragenter", function (event) {
    if (!hasFile(event)) return;
    if (around.tagName === "DETAILS") around.open = true;
    show(over + 1);
  });
  document.addEventListener("dragleave", function (event) { if (hasFile(event)) show(over - 1); });
  document.addEventListener("dragover", function (event) { if (hasFile(event)) event.preventDefault(); });
  document.addEventListener("drop", function (event) {
    if (!hasFile(event)) return;
    event.preventDefault();
    show(0);
    refuse([]);
    file.files = event.dataTransfer.files;
    file.focus();
  });
  form.querySelectorAll(".with-script").forEach(function (one) { one.hidden = false; });
})();
