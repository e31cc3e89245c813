// Numbers, fields and values of a gallery as people read them.

// A similarity: 1 is the same image. Below 0 nothing is alike any more.
export const percent = (share) => `${Math.round(100 * Math.max(0, share))}%`;

export const number = (value) => value.toLocaleString(undefined, { maximumFractionDigits: 2 });

// Returns what an item is called: its title, else its caption, else the name of its file.
export const titleOf = ({ id, caption, metadata }) => String(metadata?.title || "") || caption || metadata?.file_name?.split("/").pop() || id;

// Returns "Frame colour" for "frame_colour". The column of row numbers that pandas saves has no name.
export function fieldName(name) {
  const words = name.replace(/[_\s]+/g, " ").trim() || name.trim() || "(no name)";
  return words[0].toUpperCase() + words.slice(1);
}

// Returns the text of a condition of a filter: a value, several, or a range.
export function conditionName(condition) {
  if (typeof condition === "boolean") return condition ? "yes" : "no";
  if (typeof condition === "number") return number(condition);
  if (Array.isArray(condition)) return condition.map(conditionName).join(" or ");
  const { gte, lt, lte } = condition ?? {};
  if (typeof gte === "string" && lt - gte === 1) return gte; // a year
  if (gte !== undefined && (lt ?? lte) !== undefined) return `${number(gte)} – ${number(lt ?? lte)}`;
  if (typeof gte === "number") return `from ${number(gte)}`;
  if (typeof lte === "number") return `up to ${number(lte)}`;
  return typeof condition === "string" ? condition : JSON.stringify(condition);
}
