/** Numbers as people read them. */

const WHOLE = new Intl.NumberFormat("en");

export const whole = (value) => WHOLE.format(Math.round(value));

/** Speed, with a decimal while it is small. */
export const speed = (value) => (value < 100 ? value.toFixed(1) : whole(value));

/** A time of `value` seconds. */
export function seconds(value) {
  return value < 1 ? `${milliseconds(value * 1000)}` : `${value.toFixed(2)} s`;
}

/** A time of `value` milliseconds. */
export function milliseconds(value) {
  return `${value < 10 ? value.toFixed(2) : whole(value)} ms`;
}

/** A size: bytes, kB, MB (powers of 1000). */
export function bytes(value) {
  if (value < 10_000) return `${whole(value)} B`;
  if (value < 1e6) return `${(value / 1e3).toFixed(1)} kB`;
  return value < 1e9 ? `${(value / 1e6).toFixed(1)} MB` : `${(value / 1e9).toFixed(2)} GB`;
}

/** A number of a tensor: short, its sign always shown so that columns stand still. */
export function activation(value) {
  if (!Number.isFinite(value)) return "·";
  const digits = Math.abs(value) < 10 ? 3 : Math.abs(value) < 100 ? 2 : 1;
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
}
