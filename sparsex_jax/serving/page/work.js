// One piece of work with the server at a time, which Stop ends, and what is measured when there is none.

let running = null; // AbortController of the work that is under way
let measuring = null; // of the measurement
const hooks = { begin() {}, end() {}, fail() {} };

// begin(): work begins. end(): it has ended. fail(error): with this error.
export function onWork(listeners) {
  Object.assign(hooks, listeners);
}

export function isWorking() {
  return running !== null;
}

export function stop() {
  running?.abort();
}

// While a job is under way, no other begins.
export async function work(job) {
  if (running) return;
  measuring?.abort();
  running = new AbortController();
  const { signal } = running;
  hooks.begin();
  try {
    await job(signal);
  } catch (error) {
    if (!signal.aborted) hooks.fail(error);
  } finally {
    running = null;
    hooks.end();
  }
}

// Does a job until the next work begins. That it fails is no news.
export async function measure(job) {
  measuring?.abort();
  measuring = new AbortController();
  try {
    await job(measuring.signal);
  } catch {
    // the page says as much as it knows without it
  }
}

// Waits for a promise, or until Stop. The promise goes on then: what the server has begun to store, it stores.
export function untilStopped(promise, signal) {
  promise.catch(() => {}); // after Stop, nobody waits for it
  const stopped = new Promise((_, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
  return Promise.race([promise, stopped]);
}
