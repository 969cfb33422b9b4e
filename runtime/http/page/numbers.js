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
  const size = Math.abs(value);
  const digits = size < 10 ? 3 : size < 100 ? 2 : 1;
  const text = size > 0 && size < 0.0005 ? size.toExponential(0) : size.toFixed(digits);
  return `${value < 0 ? "−" : "+"}${text}`;
}
