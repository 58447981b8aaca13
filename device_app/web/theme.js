"use strict";
// Before anything is painted: the design that was chosen here, or else that of the system.
(() => {
  try {
    const kept = localStorage.getItem("theme");
    if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
  } catch { /* no storage: that of the system */ }
})();
