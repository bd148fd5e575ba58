// What stays in the browser: keys for as long as the tab is open, the history until it is cleared.
window.qaaConsole = {
  keys: () => JSON.parse(sessionStorage.getItem("qaa-keys") || '["", ""]'),
  keepKeys: (keys) => sessionStorage.setItem("qaa-keys", JSON.stringify(keys)),
  history: () => JSON.parse(localStorage.getItem("qaa-history") || "[]"),
  remember(entry) {
    let entries = [entry, ...this.history()].slice(0, 50);
    while (entries.length) {
      try {
        return localStorage.setItem("qaa-history", JSON.stringify(entries));
      } catch {
        entries = entries.slice(0, entries.length / 2); // the browser gives a page a few megabytes
      }
    }
  },
  forget: () => localStorage.removeItem("qaa-history"),
};
