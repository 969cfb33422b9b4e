/** Answers under way: any number of conversations at once, one answer in each. */

import { ApiError, streamChat } from "./api.js";
import { requestFor } from "./conversation.js";

const SAVE_EVERY_MS = 700;

export class Answers {
  /**
   * `on`: grown(conversation, answer) for each piece, ended(conversation, answer) once, and
   * save(conversation) now and then in between.
   */
  constructor(on) {
    this.on = on;
    this.running = new Map(); // conversation id -> {conversation, answer, abort}
  }

  isBusy = (id) => this.running.has(id);

  get anyBusy() {
    return this.running.size > 0;
  }

  /** Stop the answer of a conversation, if there is one. */
  stop(id) {
    this.running.get(id)?.abort.abort();
  }

  /** Conversations with an answer under way. */
  conversations() {
    return [...this.running.values()].map(({ conversation }) => conversation);
  }

  /** Fetch `answer`, the empty last message of `conversation`; never throws. */
  async run(conversation, answer) {
    const abort = new AbortController();
    this.running.set(conversation.id, { conversation, answer, abort });
    let state = "done";
    let saved = Date.now();
    try {
      for await (const chunk of streamChat(requestFor(conversation, answer), abort.signal)) {
        const choice = chunk.choices?.[0];
        answer.content += choice?.delta?.content ?? "";
        if (choice?.finish_reason === "length") state = "length";
        if (chunk.privatelora) answer.figures = chunk.privatelora;
        this.on.grown(conversation, answer);
        if (Date.now() - saved > SAVE_EVERY_MS) {
          this.on.save(conversation);
          saved = Date.now();
        }
      }
    } catch (error) {
      if (error.name === "AbortError") state = "stopped";
      else {
        state = "failed";
        const known = error instanceof ApiError;
        answer.error = { kind: known ? error.kind : "other", message: error.message };
        if (!known) console.error(error);
      }
    }
    answer.state = state;
    conversation.updated = Date.now();
    this.running.delete(conversation.id);
    this.on.ended(conversation, answer);
  }
}
