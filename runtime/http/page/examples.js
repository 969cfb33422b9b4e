/** Questions to begin with. */
export const EXAMPLES = [
  "Explain in three sentences how a rainbow forms.",
  "Write a short note that thanks a neighbour for watering the plants.",
  "Write a Python function that reverses the words of a sentence.",
  "What is good to know before a first walk in the mountains?",
];
