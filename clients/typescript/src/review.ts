/** `npm run review DIFF`: adds a provider key and reviews a diff with it (README.md). */
import { readFileSync } from "node:fs";

import { Code, ConnectError, createClient, type Transport } from "@connectrpc/connect";

import { dial, loadTrust, newId, seal, type Trust } from "./byokeep.js";
import { Provider } from "./gen/byokeep/common/v1/options_pb.js";
import { KeyService, ValidationVerdict } from "./gen/byokeep/orchestrator/v1/key_pb.js";
import {
  FailureReason, type Review, ReviewService, ReviewState, Severity,
} from "./gen/byokeep/orchestrator/v1/review_pb.js";

function setting(name: string): string {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set`);
  return value;
}

async function addKey(transport: Transport, trust: Trust, tenant: string): Promise<void> {
  const keys = createClient(KeyService, transport);
  const context = {
    tenant, owner: "", provider: "openai", keyId: newId("key"), operation: "add",
    requestId: newId("req"),
  } as const;
  const added = await keys.addKey({
    parent: `tenants/${tenant}`,
    keyId: context.keyId,
    provider: Provider.OPENAI,
    displayName: "from-typescript",
    sealedKey: await seal(keys, trust, context, setting("OPENAI_API_KEY")),
    requestId: context.requestId,
  });
  for await (const answer of keys.watchKey({ name: added.key?.providerKey?.name })) {
    if (!answer.done) continue;
    const verdict = answer.key?.validation?.verdict ?? ValidationVerdict.UNSPECIFIED;
    console.log("key", context.keyId, ValidationVerdict[verdict]);
    return;
  }
  throw new Error("the stream ended before the verdict");
}

async function review(transport: Transport, tenant: string, diff: Buffer): Promise<void> {
  const reviews = createClient(ReviewService, transport);
  const { review: submitted } = await reviews.submitReview({
    parent: `tenants/${tenant}`,
    input: { repository: "acme/shop", diff },
    requestId: newId("req"),
  });
  const ended = await watch(transport, submitted?.name ?? "");
  if (ended.state !== ReviewState.COMPLETED) {
    throw new Error(`${FailureReason[ended.failure]}: ${ended.failureMessage}`);
  }
  for (const { path, startLine, severity, title } of ended.findings) {
    console.log(`${path}:${startLine} ${Severity[severity]} ${title}`);
  }
  console.log(`${ended.findingCount} findings by ${ended.model}`);
}

/**
 * Follows a review to its end. The stream begins with the present state, so that one that was
 * lost is opened again and misses nothing.
 */
async function watch(transport: Transport, name: string): Promise<Review> {
  const reviews = createClient(ReviewService, transport);
  const terminal = [ReviewState.COMPLETED, ReviewState.FAILED, ReviewState.CANCELLED];
  for (;;) {
    try {
      for await (const { review, nextPageToken } of reviews.watchReview({ name })) {
        if (!review || !terminal.includes(review.state)) continue;
        // The pages of findings that follow the first.
        for (let pageToken = nextPageToken; pageToken; ) {
          const page = await reviews.getReview({ name, pageToken });
          review.findings.push(...(page.review?.findings ?? []));
          pageToken = page.nextPageToken;
        }
        return review;
      }
    } catch (error) {
      // ResourceExhausted: more watch than are served at once.
      const { code } = ConnectError.from(error);
      if (code !== Code.Unavailable && code !== Code.ResourceExhausted) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

const [diff] = process.argv.slice(2);
if (!diff) throw new Error("usage: npm run review DIFF");
const trust = loadTrust(setting("BYOKEEP_TRUST"));
const transport = dial(
  setting("BYOKEEP_ORCHESTRATOR"),
  setting("BYOKEEP_ORCHESTRATOR_NAME"),
  setting("BYOKEEP_CERTIFICATE"),
  setting("BYOKEEP_KEY"),
  trust,
);
const tenant = setting("BYOKEEP_TENANT");
await addKey(transport, trust, tenant);
await review(transport, tenant, readFileSync(diff));
process.exit(0); // the transport would keep its connection for a while
