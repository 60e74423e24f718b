import { svelte } from '@sveltejs/vite-plugin-svelte';
import { defineConfig } from 'vite';

export default defineConfig({
  plugins: [
    svelte({
      compilerOptions: {
        runes: true,
        // A canvas that is a picture says so.
        warningFilter: ({ code }) => code !== 'a11y_no_interactive_element_to_noninteractive_role',
      },
    }),
  ],
  build: {
    outDir: '../unroll_web/page/static',
    emptyOutDir: true,
    target: 'es2022',
    cssTarget: ['chrome123', 'firefox120', 'safari17.5'],
    modulePreload: { polyfill: false },
    // The page's policy allows no data: fonts or scripts; every asset is a file.
    assetsInlineLimit: 0,
    rollupOptions: { input: { index: 'index.html', microphone: 'src/microphone.js' }, output: {
      entryFileNames: (chunk) => (chunk.name === 'microphone' ? 'assets/microphone.js' : 'assets/[name]-[hash].js'),
    } },
  },
});
