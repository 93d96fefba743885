/**
 * Seals provider keys and calls byokeep from TypeScript.
 *
 * An example that is tested, small enough to be copied: a connection over mutual TLS, the intake
 * statement verified against the pinned trust bundle, the seal of docs/sealing.md. The stubs in
 * `gen` are made by `npm run generate`.
 */
import { createPublicKey, randomBytes, verify } from "node:crypto";
import { readFileSync } from "node:fs";

import { fromBinary } from "@bufbuild/protobuf";
import { timestampDate } from "@bufbuild/protobuf/wkt";
import type { Client, Transport } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { Aes256Gcm, CipherSuite, DhkemX25519HkdfSha256, HkdfSha256 } from "@hpke/core";
import { XWing } from "@hpke/hybridkem-x-wing";

import { HpkeSuite, type SignedEnvelope } from "./gen/byokeep/common/v1/options_pb.js";
import {
  type IntakeStatement,
  IntakeStatementSchema,
} from "./gen/byokeep/keyvault/v1/custody_pb.js";
import type { KeyService } from "./gen/byokeep/orchestrator/v1/key_pb.js";

const INTAKE_PAYLOAD_TYPE = "application/vnd.byokeep.intake-key.v1+protobuf";
const SEAL_LABEL = "byokeep/intake/v1";
const SKEW_MS = 2 * 60_000;
const MAX_WINDOW_MS = 3_600_000;

/** The suite that `seal` asks for: ML-KEM-768 with X25519. */
export const SUITE = HpkeSuite.MLKEM768_X25519_V1;

/** What a client believes: trust.json. */
export interface Trust {
  deployment: string;
  ca: string[];
  intake_signing_keys: Record<string, string>;
}

/** An intake statement that is not to be believed; nothing was sealed. */
export class UntrustedError extends Error {
  constructor(why: string) {
    super(`intake statement refused: ${why}`);
  }
}

/** Reads trust.json. */
export function loadTrust(path: string): Trust {
  const trust = JSON.parse(readFileSync(path, "utf8")) as Trust;
  if (!trust.deployment || !trust.ca?.length) {
    throw new Error(`${path}: a trust bundle has a deployment and CA certificates`);
  }
  return trust;
}

/**
 * Returns a transport over mutual TLS 1.3. The server's certificate must come from a CA of the
 * trust bundle and have the name `serverName`, whatever address is dialled.
 */
export function dial(
  address: string,
  serverName: string,
  certificate: string,
  key: string,
  trust: Trust,
): Transport {
  return createGrpcTransport({
    baseUrl: `https://${address}`,
    nodeOptions: {
      ca: trust.ca,
      cert: readFileSync(certificate),
      key: readFileSync(key),
      servername: serverName,
      minVersion: "TLSv1.3",
    },
  });
}

/** Everything that a seal is bound to. */
export interface SealContext {
  tenant: string;
  owner: string;
  provider: "openai" | "anthropic" | "gemini";
  keyId: string;
  operation: "add" | "rotate";
  requestId: string;
}

/** HPKE's info: nine fields, each after its length. */
export function sealInfo(context: SealContext, deployment: string, intakeKeyId: string): Buffer {
  const { tenant, owner, provider, keyId, operation, requestId } = context;
  const fields = [
    SEAL_LABEL, deployment, intakeKeyId, tenant, owner, provider, keyId, operation, requestId,
  ];
  return Buffer.concat(
    fields.flatMap((field) => {
      const length = Buffer.alloc(4);
      length.writeUInt32BE(Buffer.byteLength(field));
      return [length, Buffer.from(field)];
    }),
  );
}

/** Gets an intake key, checks who says so, and seals a provider key to it. */
export async function seal(
  keys: Client<typeof KeyService>,
  trust: Trust,
  context: SealContext,
  key: string,
) {
  checkKey(key);
  const answer = await keys.getIntakeKey({ parent: `tenants/${context.tenant}`, suite: SUITE });
  if (!answer.statement) throw new UntrustedError("there is none");
  return sealTo(verifyStatement(answer.statement, trust, SUITE, new Date()), context, key);
}

/**
 * Refuses what can't be a provider's key. It is the least of docs/sealing.md's fourth part;
 * docs/vectors/key-shapes-v1.json has the rest, which keyvault applies too.
 */
export function checkKey(key: string): void {
  if (!/^[!-~]{16,512}$/.test(key)) {
    throw new Error("a provider key has 16 to 512 printable ASCII characters, and no blank");
  }
}

/**
 * Returns the statement that a pinned key signed for this deployment, suite and time. The payload
 * is parsed only after its signature is verified.
 */
export function verifyStatement(
  envelope: SignedEnvelope,
  trust: Trust,
  suite: HpkeSuite,
  now: Date,
): IntakeStatement {
  if (envelope.payloadType !== INTAKE_PAYLOAD_TYPE) throw new UntrustedError("another type");
  const pinned = Object.hasOwn(trust.intake_signing_keys, envelope.keyId)
    ? trust.intake_signing_keys[envelope.keyId]
    : undefined;
  if (!pinned) throw new UntrustedError("its signing key is not pinned");
  const x = Buffer.from(pinned, "base64").toString("base64url");
  const publicKey = createPublicKey({ key: { kty: "OKP", crv: "Ed25519", x }, format: "jwk" });
  if (!verify(null, signedBytes(envelope), publicKey, envelope.signature)) {
    throw new UntrustedError("its signature does not verify");
  }
  const statement = fromBinary(IntakeStatementSchema, envelope.payload);
  const start = statement.notBefore ? timestampDate(statement.notBefore).getTime() : NaN;
  const end = statement.notAfter ? timestampDate(statement.notAfter).getTime() : NaN;
  if (statement.deployment !== trust.deployment) throw new UntrustedError("another deployment");
  const isNow = start - SKEW_MS <= now.getTime() && now.getTime() <= end;
  if (!isNow || !(end - start <= MAX_WINDOW_MS)) throw new UntrustedError("its window is not now");
  if (statement.suite !== suite) throw new UntrustedError("another suite than was asked for");
  return statement;
}

/** The bytes that are signed: DSSE's pre-authentication encoding. */
export function signedBytes(envelope: SignedEnvelope): Buffer {
  const { payloadType, payload } = envelope;
  const head = `DSSEv1 ${payloadType.length} ${payloadType} ${payload.length} `;
  return Buffer.concat([Buffer.from(head), payload]);
}

/** Seals a provider key to the intake key of a statement that was verified. */
export async function sealTo(statement: IntakeStatement, context: SealContext, key: string) {
  const suite = cipherSuite(statement.suite);
  const recipientPublicKey = await suite.kem.deserializePublicKey(bytes(statement.publicKey));
  const info = sealInfo(context, statement.deployment, statement.intakeKeyId);
  const { enc, ct } = await suite.seal(
    { recipientPublicKey, info: bytes(info) },
    bytes(Buffer.from(key)),
  );
  return {
    intakeKeyId: statement.intakeKeyId,
    suite: statement.suite,
    ciphertext: Buffer.concat([Buffer.from(enc), Buffer.from(ct)]),
  };
}

/** The cipher suite of a suite's number. */
export function cipherSuite(suite: HpkeSuite): CipherSuite {
  const kem =
    suite === HpkeSuite.MLKEM768_X25519_V1
      ? new XWing()
      : suite === HpkeSuite.X25519_V1
        ? new DhkemX25519HkdfSha256()
        : undefined;
  if (!kem) throw new Error(`suite ${suite} is not supported`);
  return new CipherSuite({ kem, kdf: new HkdfSha256(), aead: new Aes256Gcm() });
}

/** A fresh id such as key_01k…: a ULID in lower case after its kind. */
export function newId(kind: string): string {
  const alphabet = "0123456789abcdefghjkmnpqrstvwxyz";
  let value = BigInt(`0x${Date.now().toString(16).padStart(12, "0")}${randomBytes(10).toString("hex")}`);
  let digits = "";
  for (let place = 0; place < 26; place++) {
    digits = alphabet[Number(value & 31n)] + digits;
    value >>= 5n;
  }
  return `${kind}_${digits}`;
}

/** The bytes alone, of what may be a part of a larger buffer. */
export function bytes(view: Uint8Array): ArrayBuffer {
  return Uint8Array.from(view).buffer;
}
