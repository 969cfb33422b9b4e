/**
 * The theme a person chose: light, dark, or (by default) what the system says.
 * A classic script in the head, so that the page is never painted in the other one first.
 */
(() => {
  const KEY = "privatelora.theme";
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");

  function read() {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // storage is blocked: the system's theme
    }
  }

  function apply(theme) {
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    else delete root.dataset.theme;
  }

  apply(read());

  /** Change between light and dark; back to the system's choice when that is the same. */
  window.toggleTheme = () => {
    const systemTheme = system.matches ? "dark" : "light";
    const shown = root.dataset.theme ?? systemTheme;
    const wanted = shown === "dark" ? "light" : "dark";
    apply(wanted === systemTheme ? null : wanted);
    try {
      if (wanted === systemTheme) localStorage.removeItem(KEY);
      else localStorage.setItem(KEY, wanted);
    } catch {
      // The choice then lasts as long as the page.
    }
    return wanted;
  };
})();
