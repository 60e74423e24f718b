// Theme: what the reader chose, or what the system has; and whether movement should be spared.
const dark = matchMedia('(prefers-color-scheme: dark)');
const still = matchMedia('(prefers-reduced-motion: reduce)');

class Theme {
  choice = $state(localStorage.getItem('theme') ?? 'auto');
  #system = $state(dark.matches ? 'dark' : 'light');
  still = $state(still.matches);

  constructor() {
    dark.addEventListener('change', () => (this.#system = dark.matches ? 'dark' : 'light'));
    still.addEventListener('change', () => (this.still = still.matches));
    this.#apply();
  }

  get name() {
    return this.choice === 'auto' ? this.#system : this.choice;
  }

  next() {
    this.choice = this.name === 'dark' ? 'light' : 'dark';
    localStorage.setItem('theme', this.choice);
    this.#apply();
  }

  #apply() {
    if (this.choice === 'auto') delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = this.choice;
  }
}

export const theme = new Theme();
