/** The published vectors: theirs open, ours open alike, and a statement is believed as pinned. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { create } from "@bufbuild/protobuf";

import {
  bytes, checkKey, cipherSuite, newId, sealInfo, sealTo, signedBytes, UntrustedError, verifyStatement,
} from "./byokeep.js";
import { HpkeSuite, SignedEnvelopeSchema } from "./gen/byokeep/common/v1/options_pb.js";
import { IntakeStatementSchema } from "./gen/byokeep/keyvault/v1/custody_pb.js";

const vectors = JSON.parse(
  readFileSync(new URL("../../../docs/vectors/seal-v1.json", import.meta.url), "utf8"),
);
const unhex = (text: string) => Buffer.from(text, "hex");
const suiteOf = (name: string) =>
  name === "HPKE_SUITE_X25519_V1" ? HpkeSuite.X25519_V1 : HpkeSuite.MLKEM768_X25519_V1;

test("the published seals open, and ours open alike", async () => {
  assert.ok(vectors.seals.length >= 4);
  for (const vector of vectors.seals) {
    const suite = cipherSuite(suiteOf(vector.suite));
    const recipientKey = await suite.kem.importKey(
      "raw", bytes(unhex(vector.seed ?? vector.private_key)), false,
    );
    const context = {
      tenant: vector.tenant, owner: vector.owner, provider: vector.provider,
      keyId: vector.key_id, operation: vector.operation, requestId: vector.request_id,
    };
    const info = sealInfo(context, vector.deployment, vector.intake_key_id);
    assert.equal(info.toString("hex"), vector.info);
    const length = suite.kem.encSize;
    const open = async (sealed: Uint8Array) =>
      Buffer.from(
        await suite.open(
          { recipientKey, enc: bytes(sealed.subarray(0, length)), info: bytes(info) },
          bytes(sealed.subarray(length)),
        ),
      ).toString();
    assert.equal(await open(unhex(vector.sealed)), vector.plaintext);
    const statement = create(IntakeStatementSchema, {
      deployment: vector.deployment, intakeKeyId: vector.intake_key_id,
      suite: suiteOf(vector.suite), publicKey: unhex(vector.public_key),
    });
    const sealed = await sealTo(statement, context, vector.plaintext);
    assert.equal(await open(sealed.ciphertext), vector.plaintext);
  }
});

test("a statement is believed only as it was pinned", () => {
  assert.ok(vectors.statements.length >= 2);
  for (const vector of vectors.statements) {
    const suite = suiteOf(vector.suite);
    const start = Date.parse(vector.not_before);
    const now = new Date(start + 60_000);
    const pinned = unhex(vector.signing_public_key).toString("base64");
    const trust = { deployment: "example", ca: [], intake_signing_keys: { [vector.key_id]: pinned } };
    const parts = {
      payloadType: vector.payload_type as string, payload: unhex(vector.payload),
      keyId: vector.key_id as string, signature: unhex(vector.signature),
    };
    const envelope = create(SignedEnvelopeSchema, parts);
    assert.equal(signedBytes(envelope).toString("hex"), vector.signed_bytes);
    assert.equal(verifyStatement(envelope, trust, suite, now).suite, suite);

    // All else is right: nothing but the signature tells.
    const altered = Buffer.from(parts.signature);
    altered.writeUInt8(altered.readUInt8(0) ^ 1, 0);
    const forged = create(SignedEnvelopeSchema, { ...parts, signature: altered });
    const other = create(SignedEnvelopeSchema, { ...parts, payloadType: "text/plain" });
    const at = (seconds: number) => new Date(start + seconds * 1000);
    for (const refused of [
      () => verifyStatement(forged, trust, suite, now),
      () => verifyStatement(other, trust, suite, now),
      () => verifyStatement(envelope, { ...trust, intake_signing_keys: {} }, suite, now),
      () => verifyStatement(envelope, { ...trust, deployment: "another" }, suite, now),
      () => verifyStatement(envelope, trust, HpkeSuite.UNSPECIFIED, now),
      () => verifyStatement(envelope, trust, suite, at(2 * 3600)),
      () => verifyStatement(envelope, trust, suite, at(-3600)),
    ]) {
      assert.throws(refused, UntrustedError);
    }
  }
});

test("what can't be a key is refused, and ids have the form that the service takes", () => {
  assert.throws(() => checkKey("too short"));
  assert.throws(() => checkKey(`${"x".repeat(40)}\n`));
  assert.match(newId("key"), /^key_[0-9a-z]{26}$/);
  assert.notEqual(newId("key"), newId("key"));
});
