// Upload of a run's archive: drop, checks before it is sent, progress, and what is wrong with it.
(function () {
  "use strict";
  var form = document.getElementById("archive-form");
  if (!form) return;
  var file = form.elements.archive, sending = document.getElementById("sending"), bar = sending.querySelector("progress"),
    line = sending.querySelector(".note"), said = sending.querySelector("[role=status]"), wrong = form.querySelector(".problems"),
    list = wrong.querySelector("ul"), upload = form.querySelector(".send .primary"), stop = form.querySelector(".send [type=button]"),
    fields = Array.from(form.querySelectorAll("input")), title = document.title,
    request = null, clock = 0, marks = [], whole = 0, told = "";
  var WINDOW = 10, IDLE = 5;  // seconds that the rate is measured over, and without a byte after which that is said

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
    var focused = document.activeElement === stop || document.activeElement === document.body;
    request = null;
    window.clearInterval(clock);
    document.title = title;
    sending.hidden = stop.hidden = true;
    upload.hidden = false;
    fields.forEach(function (one) { one.disabled = false; });
    if (focused) upload.focus();
  }
  // The line changes every second; a screen reader is told each quarter, and when it stands still or is sent.
  function show() {
    var last = marks[marks.length - 1], first = marks[0], idle = performance.now() / 1000 - last[0], share = last[1] / whole,
      rate = (last[1] - first[1]) / Math.max(last[0] - first[0], .001), total = file.files[0].size,
      parts = size(Math.min(last[1], total)) + " of " + size(total), stage = String(Math.floor(4 * share)), text;
    if (last[1] >= whole) text = stage = "Sent; the service checks it.";
    else if (idle > IDLE) { text = parts + "; no byte was sent for " + time(idle); stage = "idle"; }
    else if (!rate) text = stage = "Begins.";
    else text = parts + " (" + Math.floor(100 * share) + "%), " + size(rate) + " a second, about " + time((whole - last[1]) / rate) + " left";
    bar.value = share;
    line.textContent = text;
    document.title = Math.floor(100 * share) + "% · " + title;
    if (stage !== told) { told = stage; said.textContent = text; }
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
    var content = new FormData(form);
    request = new XMLHttpRequest();
    request.open("POST", form.action);
    request.setRequestHeader("Accept", "application/json");
    request.responseType = "json";
    request.upload.addEventListener("progress", function (event) {
      var now = performance.now() / 1000;
      whole = event.total;
      marks.push([now, event.loaded]);
      while (marks.length > 2 && marks[0][0] < now - WINDOW) marks.shift();
      if (event.loaded >= whole) show();
      else bar.value = event.loaded / whole;
    });
    request.addEventListener("load", function () {
      var answer = this.response || {};
      if (this.status === 201) { request = null; window.location.assign(answer.location); return; }
      if (this.status === 401) { request = null; window.location.reload(); return; }
      refuse(answer.problems && answer.problems.length ? answer.problems : [answer.detail || "the service answered " + this.status + "; try again"]);
    });
    request.addEventListener("error", function () { refuse(["the connection broke off, and nothing was kept; upload it again, or use llmprune upload, which continues"]); });
    request.addEventListener("abort", function () {
      refuse([]);
      sending.hidden = false;
      bar.hidden = true;
      line.textContent = said.textContent = "Stopped; nothing of it was kept.";
    });
    marks = [[performance.now() / 1000, 0]];
    whole = file.files[0].size;
    told = "";
    sending.hidden = stop.hidden = bar.hidden = false;
    upload.hidden = true;
    stop.focus();
    fields.forEach(function (one) { one.disabled = true; });  // what is typed now would not be sent
    show();
    clock = window.setInterval(show, 1000);
    request.send(content);
  }

  form.addEventListener("submit", function (event) {
    event.preventDefault();
    if (request) return;
    refuse([]);
    check(file.files[0]).then(function (problem) { if (problem) refuse([problem]); else send(); });
  });
  stop.addEventListener("click", function () { if (request) request.abort(); });
  window.addEventListener("beforeunload", function (event) { if (request) event.preventDefault(); });

  // A file may be dropped anywhere on the page.
  var around = form.closest(".upload"), over = 0;
  function hasFile(event) { return event.dataTransfer && Array.from(event.dataTransfer.types).indexOf("Files") >= 0; }
  function mark(number) { over = Math.max(0, number); around.classList.toggle("dropping", over > 0); }
  document.addEventListener("dragenter", function (event) {
    if (request || !hasFile(event)) return;
    if (around.tagName === "DETAILS") around.open = true;
    mark(over + 1);
  });
  document.addEventListener("dragleave", function (event) { if (hasFile(event)) mark(over - 1); });
  document.addEventListener("dragover", function (event) { if (hasFile(event)) event.preventDefault(); });
  document.addEventListener("drop", function (event) {
    if (!hasFile(event)) return;
    event.preventDefault();  // the browser would open it
    mark(0);
    if (request) return;
    refuse([]);
    file.files = event.dataTransfer.files;
    file.focus();
  });
  form.querySelectorAll(".with-script").forEach(function (one) { one.hidden = false; });
})();
