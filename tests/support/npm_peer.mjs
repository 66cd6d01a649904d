// A peer in JavaScript, by one of two RFC 9421 packages: reads one job as JSON from stdin, writes its result to stdout.
// Jobs: sign or verify a request, or an answer to a request. An answer names its status, and the request it is for.
import { createHmac, timingSafeEqual } from "node:crypto";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(import.meta.url);
const job = JSON.parse(readFileSync(0, "utf8"));
const key = Buffer.from(job.key, "base64");
const mac = (data) => createHmac("sha256", key).update(data).digest();
const holds = (data, signature) => timingSafeEqual(mac(data), Buffer.from(signature));
const parameters = { created: Math.floor(Date.now() / 1000), keyid: "k1", tag: job.tag };

async function byHttpMessageSignatures() {
  const { httpbis } = require("http-message-signatures");
  const { message, request } = job;
  if (job.do === "sign") {
    const config = {
      key: { id: "k1", sign: async (data) => mac(data) },
      name: "bridge",
      params: ["created", "keyid", "tag"],
      fields: job.components,
      paramValues: { created: new Date(), tag: job.tag },
    };
    return (await httpbis.signMessage(config, message, request)).headers;
  }
  const config = {
    keyLookup: async () => ({ id: "k1", algs: ["hmac-sha256"], verify: async (data, signature) => holds(data, signature) }),
    requiredParams: ["created", "keyid", "tag"],
  };
  return (await httpbis.verifyMessage(config, message, request)) === true;
}

function described({ method, url, status, headers }, request) {
  const fields = Object.entries(headers).map(([name, value]) => ({ name, value }));
  if (status === undefined) return { kind: "request", method, targetUri: url, fields };
  return { kind: "response", status, fields, request: described(request) };
}

async function byHttpMessageSig() {
  const { component, createSignature, verifySignature } = require("http-message-sig");
  const message = described(job.message, job.request);
  const bound = component("signature", { req: true, key: "bridge" });
  if (job.do === "sign") {
    const components = job.components.map((each) => (each.startsWith('"signature"') ? bound : each));
    const signer = { algorithm: "hmac-sha256", sign: mac };
    const made = await createSignature(message, { label: "bridge", components, parameters, signer });
    return { ...job.message.headers, Signature: made.signature, "Signature-Input": made.signatureInput };
  }
  const requiredComponents = message.kind === "response" ? ["@status", "repr-digest", bound] : ["@method", "@path", "@query"];
  const policy = { algorithms: ["hmac-sha256"], requiredComponents, requiredParameters: ["created", "keyid", "tag"] };
  try {
    const resolveVerifier = () => ({ algorithm: "hmac-sha256", verify: holds });
    await verifySignature(message, { label: "bridge", policy, resolveVerifier });
    return true;
  } catch (error) {
    if (error.code !== "VerificationFailed") throw error;
    return false;
  }
}

const result = await (job.package === "http-message-sig" ? byHttpMessageSig() : byHttpMessageSignatures());
process.stdout.write(JSON.stringify(result));
