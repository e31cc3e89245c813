// Render every emoji of every vendor style to a PNG, and write the data of each emoji to emoji.json.
//
//   node render.mjs OUT [size]      ->  OUT/<style>/<code points>.png, OUT/emoji.json
//
// - Styles with a code point table are matched by it, the others by icon name, through the names in the
//   tables. Flag sets are matched by country code. One style is images named by code points.
// - Images keep their alpha channel, so training can put them on any background.
// - An existing image is not rendered again: an interrupted run continues where it stopped.
import { createRequire } from "node:module";
import { existsSync, mkdirSync, readdirSync, renameSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import sharp from "sharp";

const require = createRequire(import.meta.url);
const [out, size = "64"] = process.argv.slice(2);
if (!out) {
  console.error("usage: node render.mjs OUT [size]");
  process.exit(2);
}

const BY_CODE_POINT = ["noto", "fluent-emoji-flat", "twemoji", "openmoji", "fluent-emoji-high-contrast"];
const BY_NAME = ["fluent-emoji", "noto-v1", "emojione", "emojione-monotone", "fxemoji", "streamline-emojis"];
const BY_COUNTRY = { flag: (n) => n.match(/^([a-z]{2})-4x3$/)?.[1], "circle-flags": (n) => n, cif: (n) => n, flagpack: (n) => n };

const IMAGES = { "fluent-emoji-3d": "@lobehub/fluent-emoji-3d" };

const iconSet = (style) => require(`@iconify-json/${style}/icons.json`);
const charsOf = (style) => require(`@iconify-json/${style}/chars.json`);
const key = (hexcode) => hexcode.toLowerCase().split("-").filter((c) => c !== "fe0f").join("-");
const squash = (name) => name.toLowerCase().replace(/[^a-z0-9]/g, "");

/** Follow aliases; null for rotated or flipped icons, which no emoji set uses. */
function resolve(set, name) {
  for (let hops = 0; hops < 5; hops++) {
    if (set.icons[name]) return { width: set.width, height: set.height, left: 0, top: 0, ...set.icons[name] };
    const alias = set.aliases?.[name];
    if (!alias || alias.rotate || alias.hFlip || alias.vFlip) return null;
    name = alias.parent;
  }
  return null;
}

function readEmoji() {
  const groups = require("emojibase-data/meta/groups.json");
  const unicodeNames = require("emojibase-data/meta/unicode-names.json");
  const shortcodes = ["cldr", "emojibase", "github", "iamcal", "joypixels"].map((n) =>
    require(`emojibase-data/en/shortcodes/${n}.json`));
  const emoji = new Map();
  for (const base of require("emojibase-data/en/data.json")) {
    if (base.group === undefined || base.group === 2) continue; // lone regional indicators, skin and hair components
    for (const e of [base, ...(base.skins ?? [])]) {
      const names = shortcodes.flatMap((s) => s[e.hexcode] ?? []);
      emoji.set(key(e.hexcode), {
        char: e.emoji, label: e.label, base: key(base.hexcode), base_label: base.label,
        tags: base.tags ?? [], tones: e.tone === undefined ? [] : [e.tone].flat(), gender: base.gender ?? null,
        group: groups.groups[base.group], subgroup: groups.subgroups[base.subgroup],
        names: [...new Set([...names, unicodeNames[e.hexcode]].filter(Boolean))],
      });
    }
  }
  return emoji;
}

/** style -> Map(code points -> icon), only for emoji that emojibase knows. */
function match(emoji) {
  const named = new Map(); // squashed icon name -> code points
  const styles = new Map();
  for (const style of BY_CODE_POINT) {
    const set = iconSet(style), found = new Map();
    for (const [chars, name] of Object.entries(charsOf(style))) {
      const k = key(chars), icon = resolve(set, name);
      if (!emoji.has(k)) continue;
      if (!named.has(squash(name))) named.set(squash(name), k);
      if (icon) found.set(k, icon);
    }
    styles.set(style, found);
  }
  for (const [k, e] of emoji) for (const n of [e.label, ...e.names]) if (!named.has(squash(n))) named.set(squash(n), k);
  for (const style of BY_NAME) {
    const set = iconSet(style), found = new Map();
    for (const name of [...Object.keys(set.icons), ...Object.keys(set.aliases ?? {})]) {
      const plain = style === "streamline-emojis" ? name.replace(/-[12]$/, "") : name;
      const k = named.get(squash(plain)), icon = resolve(set, name);
      if (k && icon && !found.has(k)) found.set(k, icon);
    }
    styles.set(style, found);
  }
  for (const [style, country] of Object.entries(BY_COUNTRY)) {
    const set = iconSet(style), found = new Map();
    for (const name of Object.keys(set.icons)) {
      const code = country(name);
      if (!code || code.length !== 2) continue;
      const k = [...code].map((c) => (0x1f1e6 + c.charCodeAt(0) - 97).toString(16)).join("-");
      if (emoji.has(k)) found.set(k, resolve(set, name));
    }
    styles.set(style, found);
  }
  for (const [style, name] of Object.entries(IMAGES)) {
    const folder = join(dirname(require.resolve(`${name}/package.json`)), "assets"), found = new Map();
    for (const file of readdirSync(folder)) {
      const k = key(file.replace(/\.webp$/, ""));
      if (emoji.has(k)) found.set(k, { path: join(folder, file) });
    }
    styles.set(style, found);
  }
  return styles;
}

function open(icon, px) {
  if (icon.path) return sharp(icon.path);
  const { left, top, width, height, body } = icon;
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ` +
    `viewBox="${left} ${top} ${width} ${height}" width="${width}" height="${height}">${body}</svg>`;
  return sharp(Buffer.from(svg), { density: Math.max(1, (72 * px) / Math.max(width, height)) });
}

async function render(icon, file) {
  const px = Number(size);
  const png = await open(icon, px)
    .resize(px, px, { fit: "contain", background: { r: 0, g: 0, b: 0, alpha: 0 } })
    .png().toBuffer();
  writeFileSync(file + ".part", png);
  renameSync(file + ".part", file);
}

const emoji = readEmoji();
const jobs = [];
const counts = {};
for (const [style, icons] of match(emoji)) {
  mkdirSync(join(out, style), { recursive: true });
  counts[style] = icons.size;
  for (const [k, icon] of icons) {
    const file = join(out, style, `${k}.png`);
    if (!existsSync(file)) jobs.push([icon, file]);
  }
}
writeFileSync(join(out, "emoji.json"), JSON.stringify(Object.fromEntries(emoji)));
const start = Date.now(), failed = [];
let done = 0;
async function worker() {
  for (let job = jobs.pop(); job; job = jobs.pop()) {
    try { await render(...job); } catch (error) { failed.push(`${job[1]}: ${error.message}`); }
    if (++done % 200 === 0 || jobs.length === 0) {
      const rate = (1000 * done) / (Date.now() - start);
      process.stderr.write(`\r${done} rendered, ${jobs.length} left, ${rate.toFixed(0)}/s, ${(jobs.length / rate).toFixed(0)} s to go `);
    }
  }
}
await Promise.all(Array.from({ length: 4 }, worker));
process.stderr.write("\n");
console.log(JSON.stringify({ emoji: emoji.size, styles: counts, failed }, null, 1));
