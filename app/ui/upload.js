// Query images: chosen, dropped or pasted. They stay in this page's memory, under a name for the address.

const $ = (id) => document.getElementById(id);

export const images = new Map(); // name -> {file, url}

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
