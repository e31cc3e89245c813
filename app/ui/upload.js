// Query images: chosen, dropped or pasted. They stay in this page's memory, under a name for the address, and are sent
// in the size that models need.

const $ = (id) => document.getElementById(id);

export const images = new Map(); // name -> {file, url}

const NEEDED = 1024; // pixels of the longer side of what is searched: more than any model sees
const QUALITY = 0.92;

const shrunk = new WeakMap(); // file -> {part, image}: what was sent of it last

// Returns a promise of an image file for a search by the part `crop`, or by all of it: smaller if that saves bytes, and upright.
export function shrink(file, crop) {
  const part = JSON.stringify(crop ?? null);
  if (shrunk.get(file)?.part !== part) shrunk.set(file, { part, image: makeSmall(file, crop) });
  return shrunk.get(file).image;
}

async function makeSmall(file, crop) {
  let bitmap = null;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
    const { width, height } = bitmap;
    const scale = NEEDED / Math.max(width * (crop?.width ?? 1), height * (crop?.height ?? 1));
    if (scale >= 1) return file;
    const [wide, high] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
    const canvas = Object.assign(document.createElement("canvas"), { width: wide, height: high }), context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, wide, high);
    const type = file.type === "image/jpeg" ? file.type : "image/webp"; // WebP keeps transparent parts
    const small = await new Promise((done) => canvas.toBlob(done, type, QUALITY));
    return small && small.size < file.size ? small : file;
  } catch {
    return file; // a format that the browser cannot show
  } finally {
    bitmap?.close();
  }
}

const imageAmong = (files) => [...files].find((each) => each.type.startsWith("image/"));

// chosen: called with the name of each new query image.
export function prepareUpload(chosen) {
  const use = (file) => {
    if (!file) return;
    const name = `${Date.now().toString(36)}${images.size}`; // unique across reloads
    images.set(name, { file, url: URL.createObjectURL(file) });
    chosen(name);
  };
  $("pick").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    use($("file").files[0]);
    $("file").value = "";
  });
  addEventListener("paste", (event) => {
    const file = imageAmong(event.clipboardData.files);
    const words = event.target === $("query") && event.clipboardData.types.includes("text/plain"); // office programs copy both
    if (file && !words) {
      event.preventDefault();
      use(file);
    }
  });
  let depth = 0; // dragenter and dragleave also fire for every child
  const hasFile = (event) => [...event.dataTransfer.types].includes("Files");
  const drag = (change) => document.body.classList.toggle("dragging", (depth = Math.max(0, change)) > 0);
  addEventListener("dragenter", (event) => hasFile(event) && drag(depth + 1));
  addEventListener("dragleave", (event) => hasFile(event) && drag(depth - 1));
  addEventListener("dragover", (event) => hasFile(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    drag(0);
    const { files } = event.dataTransfer;
    use(imageAmong(files) ?? files[0]);
  });
}
