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
    this.running = new Map(); // conversation id -> {conversation, abort, leaving}
  }

  isBusy = (id) => this.running.has(id);

  get anyBusy() {
    return this.running.size > 0;
  }

  /** Stop the answer of a conversation, if there is one. */
  stop(id) {
    this.running.get(id)?.abort.abort();
  }

  /** The page goes away, perhaps to come back: keep what has come. */
  leave() {
    for (const run of this.running.values()) {
      run.leaving = true;
      this.on.save(run.conversation);
      run.abort.abort();
    }
  }

  /** Conversations with an answer under way. */
  conversations() {
    return [...this.running.values()].map(({ conversation }) => conversation);
  }

  /** Fetch `answer`, the empty last message of `conversation`; never throws. */
  async run(conversation, answer) {
    const run = { conversation, abort: new AbortController(), leaving: false };
    this.running.set(conversation.id, run);
    let state = "done";
    let saved = Date.now();
    try {
      for await (const chunk of streamChat(requestFor(conversation, answer), run.abort.signal)) {
        const choice = chunk.choices?.[0];
        answer.content += choice?.delta?.content ?? "";
        if (choice?.finish_reason === "length") state = "length";
        answer.model ??= chunk.model;
        if (chunk.privatelora) answer.figures = chunk.privatelora;
        this.on.grown(conversation, answer);
        if (Date.now() - saved > SAVE_EVERY_MS) {
          this.on.save(conversation);
          saved = Date.now();
        }
      }
    } catch (error) {
      if (run.leaving) state = "interrupted";
      else if (error.name === "AbortError") state = "stopped";
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
