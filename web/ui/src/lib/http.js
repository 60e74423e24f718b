// HTTP: the page's JSON API.

/** Fetches JSON; throws the problem's detail as an Error. */
export async function json(path, options) {
  const answer = await fetch(path, options);
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.detail ?? `${path}: ${answer.status}`);
  return content;
}
