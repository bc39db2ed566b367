// Requests to the server.

export const ALTERNATIVES = 5;
const running = new Set();

export const busy = () => running.size > 0;

export function stopAll() {
  for (const control of running) control.abort();
}

export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  const error = await answer.json().then(body => body.error.message, () => `The server answered with status ${answer.status}.`);
  if (answer.status === 401) {
    document.getElementById("key").hidden = false;
    document.getElementById("secret").focus();
  }
  throw new Error(error);
}

// The events of a stream, as objects.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The server ended the answer early.");
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice("data: ".length));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// Stream what the model writes, until it ends or `stopAll` stops it. `read` takes each part and returns its number of
// tokens, `draw` shows them, and `say` reports the speed. Returns why the text ended: "stop", "length", "stopped" or
// "failed".
export async function generate(path, body, read, draw, say) {
  const control = new AbortController();
  running.add(control);
  const started = performance.now();
  let first, count = 0, reason, frame = 0;
  const show = () => {
    cancelAnimationFrame(frame);
    frame = 0;
    draw();
    const seconds = (performance.now() - first) / 1000;
    const speed = count > 1 && seconds > 0.1 ? `, ${((count - 1) / seconds).toFixed(0)} per second` : "";
    say(`${count} ${count === 1 ? "token" : "tokens"}${speed}; the first after ${((first - started) / 1000).toFixed(2)} s`);
  };
  say("Reading ...");
  try {
    const answer = await ask(path, {
      method: "POST", body: JSON.stringify({ ...body, stream: true }), signal: control.signal,
      headers: { "Content-Type": "application/json" },
    });
    for await (const { choices: [choice] } of events(answer)) {
      count += read(choice);
      reason = choice.finish_reason;
      if (count) first ??= performance.now();
      if (count) frame ||= requestAnimationFrame(show);  // tokens may come faster than a browser can lay them out
    }
    if (count) show();
    return reason;
  } catch (error) {
    draw();
    if (control.signal.aborted) {
      say(`${count} ${count === 1 ? "token" : "tokens"}. Stopped.`);
      return "stopped";
    }
    say(error instanceof TypeError ? "Cannot reach the server: is it still running?" : error.message, true);
    return "failed";
  } finally {
    cancelAnimationFrame(frame);
    running.delete(control);
  }
}
