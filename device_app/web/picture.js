// The picture: one endless MJPEG answer, taken apart here, so that the page knows when a picture
// came, shows only the newest, and asks again when they stop.
import { $ } from "./tools.js";

const HEAD_MAX = 1024;
let watching = null, painting = false, next = null;
export const picture = { last: Date.now(), asked: 0, painted: false };

function paint(jpeg) {
  picture.last = Date.now();
  if (painting) { next = jpeg; return; }
  painting = true;
  createImageBitmap(jpeg).then((bitmap) => {
    const canvas = $("live");
    if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) { canvas.width = bitmap.width; canvas.height = bitmap.height; }
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    bitmap.close();
    picture.painted = true;
  }).catch(() => {}).finally(() => {
    painting = false;
    const jpeg = next;
    next = null;
    if (jpeg) paint(jpeg);
  });
}

function takePictures(bytes) {
  for (;;) {
    const head = new TextDecoder("latin1").decode(bytes.subarray(0, HEAD_MAX)), end = head.indexOf("\r\n\r\n");
    const length = /content-length: *(\d+)/i.exec(head.slice(0, Math.max(0, end)));
    if (!length) { if (bytes.length > HEAD_MAX) throw new Error("not a stream of pictures"); return bytes; }
    const from = end + 4, to = from + +length[1];
    if (bytes.length < to) return bytes;
    paint(new Blob([bytes.subarray(from, to)], { type: "image/jpeg" }));
    bytes = bytes.subarray(to);
  }
}

export async function connect() {
  if (watching) watching.abort();
  const mine = (watching = new AbortController());
  picture.asked = Date.now();
  let again = true;
  try {
    const answer = await fetch("/stream", { cache: "no-store", signal: mine.signal });
    again = answer.status !== 401; // until the figures are answered again
    if (!answer.ok) throw new Error("no stream");
    const reader = answer.body.getReader();
    let bytes = new Uint8Array(0);
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const all = new Uint8Array(bytes.length + value.length);
      all.set(bytes); all.set(value, bytes.length);
      bytes = takePictures(all);
    }
  } catch { /* told by the page, which sees that pictures stopped */ }
  if (again && mine === watching && !mine.signal.aborted) setTimeout(() => { if (mine === watching && !document.hidden) connect(); }, 1500);
}

// A page that nobody sees costs the board nothing.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) { if (watching) watching.abort(); } else { picture.last = Date.now(); connect(); }
});
