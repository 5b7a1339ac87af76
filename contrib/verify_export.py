#!/usr/bin/env python3
"""Verifies an export of orgkeys' audit log, independently of orgkeys.

usage: verify_export.py ARCHIVE --key KEY... [--checkpoint FILE] [--json]

  ARCHIVE            what "orgkeys audit export" wrote
  --key KEY          a verifier key, as "orgkeys audit key" printed it, or a file
                     with such lines. Take it from somebody other than who handed
                     over the archive. Repeat it for each key of a rotation
  --checkpoint FILE  a signed checkpoint that was kept elsewhere than the log: as a
                     signed note, or as the lines {"checkpoint":"..."} of a sink
  --json             print the result as one JSON object

Exit codes:

  0  verified, and the checkpoint given shows that nothing is cut off
  1  wrong, or known to be missing: the first fault is named
  2  not called as above, or a file cannot be read
  3  verified, but nothing given shows that the end is not cut off
  4  not judged: the export holds what this program is too old to know

It needs Python 3.8 and nothing but its standard library, Ed25519 included; a
signature takes it some milliseconds, and with Vault each event has one. It was
written from docs/audit.md, RFC 6962, RFC 7638, RFC 8017, RFC 8032 and the C2SP
specifications of signed-note and tlog-checkpoint, and shares no code with orgkeys.
"""
import argparse
import base64
import binascii
import hashlib
import json
import os
import re
import struct
import sys
import tarfile
import tempfile
import zlib


class Wrong(Exception):
    """The export is not what it claims to be."""


class TooOld(Exception):
    """The export holds something that this program does not know."""


def need(condition, what):
    if not condition:
        raise Wrong(what)


# Ed25519 verification, RFC 8032 section 5.1.7, in extended coordinates.
P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
SQRT_M1 = pow(2, (P - 1) // 4, P)


def recover_x(y, sign):
    if y >= P:
        return None
    x2 = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    if x2 == 0:
        return None if sign else 0
    x = pow(x2, (P + 3) // 8, P)
    if (x * x - x2) % P:
        x = x * SQRT_M1 % P
    if (x * x - x2) % P:
        return None
    return P - x if x & 1 != sign else x


def decompress(b):
    y = int.from_bytes(b, "little")
    sign, y = y >> 255, y & (1 << 255) - 1
    x = recover_x(y, sign)
    return None if x is None else (x, y, 1, x * y % P)


def add(p, q):
    a, b = (p[1] - p[0]) * (q[1] - q[0]) % P, (p[1] + p[0]) * (q[1] + q[0]) % P
    c, d = 2 * p[3] * q[3] * D % P, 2 * p[2] * q[2] % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P


def multiply(s, p):
    q = (0, 1, 1, 0)
    while s:
        if s & 1:
            q = add(q, p)
        p = add(p, p)
        s >>= 1
    return q


GY = 4 * pow(5, P - 2, P) % P
GX = recover_x(GY, 0)
G = (GX, GY, 1, GX * GY % P)


def ed25519_verify(public, message, signature):
    if len(public) != 32 or len(signature) != 64:
        return False
    a, r = decompress(public), decompress(signature[:32])
    s = int.from_bytes(signature[32:], "little")
    if a is None or r is None or s >= L:
        return False
    k = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % L
    left, right = multiply(s, G), add(r, multiply(k, a))
    return (left[0] * right[2] - right[0] * left[2]) % P == 0 and (left[1] * right[2] - right[1] * left[2]) % P == 0


# RSA: DER of SubjectPublicKeyInfo, RFC 7638 thumbprints, RSASSA-PKCS1-v1_5 with SHA-256.
def der(data, tag):
    """Splits data into the content of its first element, which has the tag, and the rest."""
    need(len(data) > 1 and data[0] == tag, "a public key is not as DER has it")
    size, at = data[1], 2
    if size & 0x80:
        count = size & 0x7f
        need(0 < count < 4 and len(data) >= 2 + count, "a public key is not as DER has it")
        size, at = int.from_bytes(data[2:2 + count], "big"), 2 + count
    need(len(data) >= at + size, "a public key is not as DER has it")
    return data[at:at + size], data[at + size:]


RSA_ENCRYPTION = bytes.fromhex("06092a864886f70d0101010500")
SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420")


def rsa_public(data):
    """Returns modulus and exponent."""
    info, rest = der(data, 0x30)
    algorithm, bits = der(info, 0x30)
    bits, behind = der(bits, 0x03)
    need(algorithm == RSA_ENCRYPTION and bits[:1] == b"\0" and not rest and not behind, "a public key is not an RSA key")
    numbers, behind = der(bits[1:], 0x30)
    n, numbers = der(numbers, 0x02)
    e, numbers = der(numbers, 0x02)
    need(not behind and not numbers and n and e and n[0] < 0x80 and e[0] < 0x80, "a public key is not an RSA key")
    return int.from_bytes(n, "big"), int.from_bytes(e, "big")


def thumbprint(n, e):
    def url64(number):
        return base64.urlsafe_b64encode(number.to_bytes((number.bit_length() + 7) // 8, "big")).rstrip(b"=").decode()
    text = '{"e":"%s","kty":"RSA","n":"%s"}' % (url64(e), url64(n))
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def rsa_verify(public, message, signature):
    n, e = public
    size = (n.bit_length() + 7) // 8
    digest = SHA256_INFO + hashlib.sha256(message).digest()
    if len(signature) != size or int.from_bytes(signature, "big") >= n or size < len(digest) + 11:
        return False
    padded = b"\x00\x01" + b"\xff" * (size - len(digest) - 3) + b"\x00" + digest
    return pow(int.from_bytes(signature, "big"), e, n) == int.from_bytes(padded, "big")


# The Merkle tree, RFC 6962 section 2.1.
def leaf_hash(leaf):
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left, right):
    return hashlib.sha256(b"\x01" + left + right).digest()


class Tree:
    """The complete subtrees of a growing tree: pairs of height and root."""

    def __init__(self):
        self.size, self.parts = 0, []

    def append(self, leaf):
        height, h = 0, leaf_hash(leaf)
        while self.parts and self.parts[-1][0] == height:
            h = node_hash(self.parts.pop()[1], h)
            height += 1
        self.parts.append((height, h))
        self.size += 1

    def root(self):
        h = self.parts[-1][1]
        for _, left in reversed(self.parts[:-1]):
            h = node_hash(left, h)
        return h


def b64(text):
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Wrong("%r is not base64" % text)


def strict(pairs):
    need(len(dict(pairs)) == len(pairs), "a JSON object has a name twice")
    return dict(pairs)


def lines(content):
    """The lines of a member. Only a newline ends one, unlike for splitlines."""
    need(not content or content.endswith(b"\n"), "the last line is torn")
    return content.decode().split("\n")[:-1]


DECODER = json.JSONDecoder(object_pairs_hook=strict)


def parse(text):
    try:
        return DECODER.decode(text)
    except ValueError as err:
        raise Wrong("not JSON: %s" % err)


def verifier_key(text):
    """C2SP signed-note: name+hash+base64(algorithm || key)."""
    name, digest, encoded = text.split("+", 2)
    key = b64(encoded)
    need(key[:1] == b"\x01" and len(key) == 33, "not an Ed25519 verifier key")
    need(hashlib.sha256(name.encode() + b"\n" + key).digest()[:4].hex() == digest, "the verifier key's hash is not its own")
    return name, bytes.fromhex(digest), key[1:]


def open_checkpoint(note, keys):
    """Returns origin, size and root of a signed checkpoint."""
    text, blank, signatures = note.partition("\n\n")
    need(blank, "a checkpoint is not signed")
    text += "\n"
    body = text.split("\n")
    need(len(body) == 4 and body[3] == "" and body[0], "a checkpoint does not have three lines")
    need(body[1].isdigit() and str(int(body[1])) == body[1], "a checkpoint has no size")
    signed = False
    for line in signatures.split("\n")[:-1]:
        dash, name, encoded = line.split(" ")
        need(dash == "\u2014", "a signature line is not one")
        raw = b64(encoded)
        for key_name, digest, public in keys:
            if name == key_name == body[0] and raw[:4] == digest:
                need(ed25519_verify(public, text.encode(), raw[4:]), "a checkpoint's signature is not the key's")
                signed = True
    need(signed, "the checkpoint of %s events is signed by no given key" % body[1])
    return body[0], int(body[1]), b64(body[2])


# What an event can hold, in the order of docs/audit.md; a test of orgkeys fails
# when the program records a field or a type that is missing here.
FIELDS = {
    "v", "id", "time", "type", "outcome", "reason", "org", "actorKind", "actor", "actorOrg", "roles",
    "action", "object", "request", "policy", "scope", "detail", "personal",
}
TYPES = {
    "orgkey.created", "orgkey.delivered", "orgkey.withdrawn", "orgkey.refused", "orgkey.deleted", "orgkey.all_deleted", "orgkey.listed",
    "orgkey.sealed", "orgkey.received", "orgkey.fetched",
    "enrollment.created", "enrollment.listed", "enrollment.claimed", "enrollment.conflict", "enrollment.approved", "enrollment.expired", "enrollment.revoked",
    "device.allowed", "device.removed", "device.listed",
    "node.registered", "node.unregistered", "node.deleted", "node.listed",
    "secret.fetched", "secret.put", "secret.deleted", "secret.listed",
    "event.read", "event.marked", "policy.asked", "request.failed", "request.repeated", "access.denied", "authn.failed",
    "seal.rewrapped", "log.rollback_accepted", "log.database_changed", "log.archived", "log.pruned", "person.erased", "pool.filled",
}


def check_form(index, event):
    """The form of version 1; what is newer is not judged."""
    need(isinstance(event, dict), "event %d is not an object" % index)
    if event.get("v") != 1:
        raise TooOld("event %d has version %r, and this program knows version 1" % (index, event.get("v")))
    for name in event:
        if name not in FIELDS:
            raise TooOld("event %d has the field %r" % (index, name))
    for name in ("id", "time", "type", "outcome"):
        need(isinstance(event.get(name), str), "event %d has no %s" % (index, name))
    if event["type"] not in TYPES:
        raise TooOld("event %d has the type %r" % (index, event["type"]))


def moment(index, event):
    m = {"index": index, "time": event["time"], "type": event["type"]}
    for theirs, ours in (("reason",) * 2, ("actorKind",) * 2, ("actor",) * 2, ("action",) * 2, ("policy",) * 2, ("request",) * 2):
        if event.get(theirs):
            m[ours] = event[theirs]
    return m


class Inventory:
    def __init__(self):
        self.lives, self.order = {}, []
        self.scopes = {}  # of keys, by ID
        self.registered = set()  # keys and their nodes

    def add(self, index, e):
        kind, detail = e["type"], e.get("detail", {})
        if kind == "orgkey.created":
            need(e["object"] not in self.lives, "event %d: the key is created a second time" % index)
            life = {"key": e["object"], "org": e["org"], "created": moment(index, e)}
            for name, source in (("algorithm", "algorithm"), ("fingerprint", "fingerprint"), ("generatedIn", "backend")):
                if detail.get(source):
                    life[name] = detail[source]
            self.lives[e["object"]] = life
            self.order.append(life)
            self.scopes[e["object"]] = detail.get("scope") or "organization"
        elif kind in ("orgkey.delivered", "orgkey.deleted", "orgkey.withdrawn"):
            life = self.lives.get(e.get("object"))
            need(life and life["org"] == e.get("org"), "event %d: the key was never created" % index)
            if kind != "orgkey.delivered":
                need("ended" not in life, "event %d: the key has ended already" % index)
                life["ended"] = moment(index, e)
            elif e["outcome"] == "success":
                life["delivered"] = moment(index, e)
        elif e.get("actorKind") == "node" and e["outcome"] == "success":
            life = self.lives.get(e.get("actor"))
            if life and life["org"] == e.get("org"):
                life["lastUse"] = moment(index, e)
                node = {"node": e.get("object", ""), "index": index}
                if kind == "node.registered" and (life["key"], node["node"]) not in self.registered:
                    self.registered.add((life["key"], node["node"]))
                    if detail.get("ip"):
                        node["ip"] = detail["ip"]
                    life.setdefault("nodes", []).append(node)

    def live(self):
        """The keys that have not ended, in the order of creation."""
        return [life for life in self.order if "ended" not in life]


USES = re.compile(r"0*([0-9]{1,10})", re.ASCII)


class Permission:
    """What an enrollment permits, as the event of its creation has it, and what came of it.

    What that event does not say is not held against anybody. The order of events is the
    evidence, not their times: orgkeys lets no claim and no approval come behind an
    enrollment's end; but an end that waits for a key that is being sealed can be recorded first.
    """

    def __init__(self, index, e):
        self.created, self.org, self.terms = moment(index, e), e.get("org"), e.get("detail", {})
        uses = USES.fullmatch(self.terms.get("uses", ""))
        self.uses = int(uses[1]) if uses and int(uses[1]) < 1 << 31 else 0  # 0: the log does not say
        self.whole = bool(self.uses and self.terms.get("scope") and self.terms.get("approval"))
        self.claims, self.ends = 0, set()

    def claim(self, index, e, detail):
        self.claims += 1
        need(self.org == e.get("org"), "event %d: the enrollment that is claimed is of another organization" % index)
        need(not self.ends, "event %d: the enrollment is claimed, and was over" % index)
        need(not self.uses or self.claims <= self.uses, "event %d: the enrollment is claimed once more than the %d times that were permitted" % (index, self.uses))
        need(self.terms.get("recipient") in (None, "", detail.get("recipient")), "event %d: the enrollment is claimed by another recipient than the one that was permitted" % index)
        tpm, ek = self.terms.get("tpm"), detail.get("ek")
        need(not tpm or (ek if tpm == "allowed" else ek == tpm), "event %d: the enrollment is claimed without the TPM that was permitted" % index)


class Deliveries:
    """How each sealed key came to who asked for it, as the events tell it."""

    def __init__(self, inventory):
        self.inventory, self.known, self.signatures = inventory, {}, {}
        self.permitted, self.claims, self.approvals = {}, {}, {}
        self.own, self.proven = {}, 0  # keys that their holders made, with their proofs, and how many of these were checked

    def add(self, index, e):
        kind, detail, thing = e["type"], e.get("detail", {}), e.get("object")
        if e["outcome"] != "success":
            return
        permission = self.permitted.get(thing)
        if kind == "enrollment.created":
            need(not permission, "event %d: the enrollment is created a second time" % index)
            self.permitted[thing] = Permission(index, e)
        elif kind in ("enrollment.revoked", "enrollment.expired") and permission:
            if e.get("reason") != "not_made":  # places of claims that brought no key: others can still claim
                permission.ends.add(kind)
        elif kind == "enrollment.approved":
            # The sweeper may come late to the claims of an expired one.
            need(not permission or "enrollment.revoked" not in permission.ends, "event %d: a claim is approved, and the enrollment was revoked" % index)
            self.approvals[thing, detail.get("recipient")] = moment(index, e)
        elif kind == "enrollment.claimed":
            need(permission, "event %d: the enrollment is claimed, and nobody created it" % index)
            permission.claim(index, e, detail)
            self.claims[detail.get("key")] = moment(index, e), detail.get("from"), detail.get("ek"), detail.get("recipient"), thing
        elif kind == "orgkey.created":
            self.keeps(index, e, thing, detail)
            if detail.get("backend") == "node":
                self.made(index, e, thing, detail)
        elif kind == "orgkey.sealed":
            self.seal(index, e, thing, detail)
        elif kind == "orgkey.delivered" and thing in self.known:
            self.known[thing]["delivered"] = moment(index, e)
        elif kind == "orgkey.received":
            self.receive(index, e, thing, detail)

    def keeps(self, index, e, key, detail):
        """A key that came by an enrollment is one that this permits."""
        enrollment, life = detail.get("enrollment"), self.inventory.lives[key]
        if not enrollment:
            return
        _, _, ek, recipient, by = self.claims.get(key, (None,) * 5)
        need(by == enrollment, "event %d: the key did not claim the enrollment by which it came" % index)
        p = self.permitted[enrollment]
        need(life["org"] == p.org, "event %d: the enrollment by which the key came is of another organization" % index)
        need(p.terms.get("scope") in (None, "", self.inventory.scopes[key]), "event %d: the key is of another scope than was permitted" % index)
        need(not p.whole or (life.get("generatedIn") == "node") == (p.terms.get("origin") == "node"), "event %d: the key is of another origin than was permitted" % index)
        need(p.terms.get("approval") != "true" or (enrollment, recipient) in self.approvals, "event %d: the key was made, and nobody approved its claim" % index)
        need(detail.get("ek") in (None, "", ek), "event %d: the key is in another TPM than claimed its enrollment" % index)

    def made(self, index, e, key, detail):
        recipient, enrollment = detail.get("recipient", ""), detail.get("enrollment")
        lines = ("orgkeys/add/v1", e["org"], recipient)
        if enrollment:
            need(self.claims.pop(key)[3] == recipient, "event %d: the key is another than claimed the enrollment by which it came" % index)
            lines = ("orgkeys/enroll/v1", enrollment, recipient)
        self.own[key] = index, "".join(line + "\n" for line in lines), b64(detail.get("signature", ""))

    def seal(self, index, e, key, detail):
        life = self.inventory.lives.get(key)
        need(life and life["org"] == e.get("org"), "event %d: the key is sealed, and was never created" % index)
        need(key not in self.known, "event %d: the key is sealed a second time" % index)
        known = {
            "key": key, "org": e["org"], "scope": self.inventory.scopes[key], "permitted": life["created"],
            "recipient": detail.get("recipient", ""), "sha256": detail.get("sealed", ""), "sealed": moment(index, e), "receipt": "none",
        }
        enrollment = detail.get("enrollment")
        if enrollment:
            self.keeps(index, e, key, detail)
            claimed, origin, _, recipient, _ = self.claims.pop(key)
            need(recipient == known["recipient"], "event %d: the key is sealed to a recipient that did not claim it" % index)
            known.update(enrollment=enrollment, permitted=self.permitted[enrollment].created, claimed=claimed)
            if origin:
                known["from"] = origin
            if (enrollment, recipient) in self.approvals:
                known["approved"] = self.approvals[enrollment, recipient]
        self.known[key] = known

    def receive(self, index, e, key, detail):
        known = self.known.get(key)
        need(known and known["org"] == e.get("org"), "event %d: the key is received, and was never sealed" % index)
        # Who used it may sign later.
        need("received" not in known or known["receipt"] == "used" and "signature" in detail, "event %d: the key is received a second time" % index)
        known["received"] = moment(index, e)
        if "signature" not in detail:
            known["receipt"] = "used"
            return
        need(detail.get("recipient") == known["recipient"] and detail.get("sealed") == known["sha256"],
             "event %d: the receipt is for other bytes than were sealed" % index)
        self.signatures[key] = b64(detail["signature"])
        answers = int(detail["answers"])
        if answers:
            known["answers"] = answers
        known["receipt"], known["unchecked"] = "unchecked", "the export was made without public keys"

    def check(self, origin, key, public):
        """The holder of the key's private half signed for what arrived, or that they made it."""
        if key in self.own:
            index, text, signature = self.own[key]
            need(rsa_verify(public, text.encode(), signature), "event %d: the proof of key %s was not signed by that key" % (index, key))
            self.proven += 1
        if key not in self.signatures:
            return
        known = self.known[key]
        text = "".join(line + "\n" for line in ("orgkeys/receipt/v1", origin, known["org"], key, known["recipient"], known["sha256"]))
        need(rsa_verify(public, text.encode(), self.signatures[key]),
             "event %d: the receipt of key %s was not signed by that key" % (known["received"]["index"], key))
        known["receipt"] = "signed"
        del known["unchecked"]

    def without_key(self, key):
        if key in self.signatures:
            self.known[key]["unchecked"] = "the key was deleted before the export was made, and its public key with it"

    def told(self):
        all_known = []
        for known in self.known.values():
            nodes = self.inventory.lives[known["key"]].get("nodes")
            all_known.append(dict(known, nodes=nodes) if nodes else known)
        return all_known

    def unproven(self):
        return len(self.own) - self.proven

    def in_part(self):
        """Of how many enrollments that were claimed the log does not have all that was permitted."""
        return sum(p.claims > 0 and not p.whole for p in self.permitted.values())

    def signed(self):
        return sum(known["receipt"] == "signed" for known in self.known.values())


def enrolled(e):
    """How a sealed key came to its holder, in words."""
    def who(m):
        return "%s %s (event %d, %s)" % (m.get("actorKind"), m.get("actor"), m["index"], m["time"])
    said = "sealed key %s of %s, for its %s" % (e["key"], e["org"], e["scope"])
    for node in e.get("nodes", ()):
        said += ", node %s" % node.get("ip", node["node"])
    said += ": permitted by " + who(e["permitted"])
    if "approved" in e:
        said += "; approved by " + who(e["approved"])
    if "claimed" in e:
        said += "; claimed by enrollment %s from %s (event %d)" % (e["enrollment"], e.get("from", "an address that is not recorded"), e["claimed"]["index"])
    said += "; the bytes %s sealed to recipient %s" % (e["sha256"], e["recipient"])
    if e["receipt"] in ("signed", "unchecked"):
        said += " went out %d times" % e.get("answers", 0)
    elif "delivered" in e:
        said += " went out at least once"
    else:
        said += " did not go out"
    return said + {
        "signed": "; received: the holder of the private key signed for them",
        "unchecked": "; received, and the signature was NOT checked: " + e.get("unchecked", ""),
        "used": "; nobody signed for them, and requests were signed with the key",
        "none": "; nobody has signed for them",
    }[e["receipt"]]


def policy_revision(files):
    h = hashlib.sha256()
    for name in sorted(files, key=lambda n: n.encode()):
        for part in (name.encode(), files[name]):
            h.update(struct.pack(">Q", len(part)) + part)
    return "sha256:" + h.hexdigest()


def unpack(packed, plain):
    """The archive is one gzip member, and nothing follows it."""
    z = zlib.decompressobj(31)
    for block in iter(lambda: packed.read(1 << 20), b""):
        need(not z.eof, "there is data after the end of the archive")
        plain.write(z.decompress(block))
    need(z.eof, "the archive is cut off")
    need(not z.unused_data, "there is data after the end of the archive")
    plain.seek(0)


ORDER = ["checkpoints.jsonl", "receipt-keys.json", "policies", "events.jsonl", "inventory.jsonl", "public-keys.jsonl"]
FORMATS = {"orgkeys-export/1": ORDER[:-1], "orgkeys-export/2": ORDER}


def check_members(names, order):
    """Each is there once, in the order of an export, under a name that leads nowhere else."""
    places = []
    for name in names:
        parts = name.split("/", 2)
        policy = len(parts) == 3 and parts[0] == "policies"
        need(policy or name in order and name != "policies", "%r is no member of an export of this format" % name)
        need(not set(name.split("/")) & {"", ".", ".."} and "\\" not in name, "%r leads elsewhere" % name)
        places.append(order.index(parts[0]))
    need(len(set(names)) == len(names), "a member is there twice")
    need(places == sorted(places), "the members are not in their order")
    need(set(places) | {2} == set(range(len(order))), "a member is missing")


RECEIPT = re.compile(r"vault:v([1-9][0-9]{0,8}):([A-Za-z0-9+/]+={0,2})", re.ASCII)


class Verifier:
    def __init__(self, keys):
        self.keys, self.tree, self.inventory = keys, Tree(), Inventory()
        self.deliveries, self.public_keys = Deliveries(self.inventory), None
        self.points, self.newest, self.receipt_keys = {}, None, {}
        self.policies, self.policy, self.policy_files = set(), None, {}  # read, and being read
        self.outside, self.signed, self.with_receipt, self.types = None, 0, 0, {}  # outside: origin, size and root

    def run(self, path):
        with open(path, "rb") as packed, tempfile.TemporaryFile() as plain:
            unpack(packed, plain)
            with tarfile.open(fileobj=plain, mode="r:") as archive:
                self.members(archive)
                plain.seek(archive.offset)
            for block in iter(lambda: plain.read(1 << 20), b""):
                need(not block.strip(b"\0"), "there is data after the end of the archive")
        need(self.complete, "inventory.jsonl is missing")
        need((self.public_keys is not None) == (self.manifest["format"] == "orgkeys-export/2"), "public-keys.jsonl is missing")

    def members(self, archive):
        members = iter(archive)
        first = next(members, None)
        need(first and first.name == "manifest.json" and first.isreg(), "manifest.json does not come first")
        self.manifest = parse(archive.extractfile(first).read().decode())
        if self.manifest["format"] not in FORMATS:
            raise TooOld("the archive's format is %r" % self.manifest["format"])
        check_members([m["name"] for m in self.manifest["members"]], FORMATS[self.manifest["format"]])
        listed = iter(self.manifest["members"])
        for info in members:
            want = next(listed, None)
            need(want and want["name"] == info.name and info.isreg(), "%s is not the member that the manifest lists at this position" % info.name)
            content = archive.extractfile(info).read()
            need(len(content) == want["size"] and hashlib.sha256(content).hexdigest() == want["sha256"],
                 "%s does not have the size and SHA-256 in the manifest" % info.name)
            self.member(info.name, content)
        left = next(listed, None)
        need(left is None, "%s is missing" % (left and left["name"]))

    complete = False

    def member(self, name, content):
        if name == "checkpoints.jsonl":
            self.checkpoints(content)
        elif name == "receipt-keys.json":
            given = [public for _, _, public in self.keys]
            for k in parse(content.decode()):
                if b64(k["public"]) in given:
                    self.receipt_keys[k["sink"], k["version"]] = b64(k["public"])
        elif name == "events.jsonl":
            self.events(content)
        elif name == "inventory.jsonl":
            self.check_inventory(content)
        elif name == "public-keys.jsonl":
            self.check_public_keys(content)
        else:
            _, revision, file = name.split("/", 2)
            if revision != self.policy:
                self.end_policy()
            self.policy = revision
            self.policy_files[file] = content

    def end_policy(self):
        """A policy's files follow one another, and its revision is their hash."""
        if self.policy is not None:
            need(policy_revision(self.policy_files) == self.policy, "the text of policy %s does not match its revision" % self.policy)
            self.policies.add(self.policy)
        self.policy, self.policy_files = None, {}

    def checkpoints(self, content):
        for line in lines(content):
            origin, size, root = open_checkpoint(parse(line)["checkpoint"], self.keys)
            need(origin == self.manifest["origin"], "a checkpoint is of another log")
            need(self.newest is None or size >= self.newest[0], "checkpoints are out of order")
            self.points.setdefault(size, set()).add(root)
            self.newest = size, root
            self.signed += 1
        need(self.newest, "there is no signed checkpoint")
        need(self.newest == (self.manifest["size"], b64(self.manifest["root"])), "the manifest is not what was signed")
        if self.outside:
            self.compare()

    def compare(self):
        """What the checkpoint from elsewhere says must be so here, too."""
        origin, size, root = self.outside
        need(origin == self.manifest["origin"], "the checkpoint given is of another log, %s" % origin)
        need(size <= self.newest[0], "the checkpoint given covers %d events, and the export holds %d: the others are missing, or the export is from before them" % (size, self.newest[0]))
        self.points.setdefault(size, set()).add(root)

    def events(self, content):
        need(self.newest, "there is no signed checkpoint")
        self.end_policy()
        need(content.endswith(b"\n"), "the last event is torn")
        for line in content[:-1].split(b"\n"):
            self.event(line.decode())
        need(self.tree.size == self.newest[0], "there are %d events, and %d were signed" % (self.tree.size, self.newest[0]))

    def event(self, line):
        index = self.tree.size
        start = '{"index":%d,"event":' % index
        need(line.startswith(start), "event %d is missing" % index)
        try:
            event, end = DECODER.raw_decode(line, len(start))
        except ValueError:
            raise Wrong("event %d is not JSON" % index)
        leaf = line[len(start):end].encode()
        check_form(index, event)
        rest = line[end:]
        if rest != "}":
            need(rest.startswith(',"receipts":'), "event %d: what follows the leaf is no receipt" % index)
            self.receipts(index, leaf, parse("{" + rest[1:])["receipts"])
            self.with_receipt += 1
        policy = event.get("policy")
        need(not policy or policy in self.policies, "event %d: the policy's text is missing" % index)
        self.inventory.add(index, event)
        self.deliveries.add(index, event)
        self.types[event["type"]] = self.types.get(event["type"], 0) + 1
        self.tree.append(leaf)
        for root in self.points.get(self.tree.size, ()):
            need(root == self.tree.root(), "the events up to %d are not those that were signed" % index)

    def receipts(self, index, leaf, receipts):
        for sink, receipt in receipts.items():
            form = RECEIPT.fullmatch(receipt)
            public = form and self.receipt_keys.get((sink, int(form[1])))
            need(public and ed25519_verify(public, leaf, b64(form[2])),
                 "event %d: the receipt of %s is not a given key's" % (index, sink))

    def check_inventory(self, content):
        need(self.tree.size, "there are no events")
        told = lines(content)
        need(len(told) == len(self.inventory.order), "the inventory has %d keys, and the events %d" % (len(told), len(self.inventory.order)))
        for line, life in zip(told, self.inventory.order):
            need(parse(line) == life, "the inventory does not tell of key %s what the events tell" % life["key"])
        self.complete = True

    def check_public_keys(self, content):
        """One for each key that lives, in the order of creation, vouched for by its fingerprint in the log."""
        for life in self.inventory.order:
            if "ended" in life:
                self.deliveries.without_key(life["key"])
        self.public_keys = 0
        live, told = self.inventory.live(), lines(content)
        need(len(told) == len(live), "there are public keys of %d keys, and %d live" % (len(told), len(live)))
        for line, life in zip(told, live):
            entry = parse(line)
            need(entry.get("key") == life["key"], "the public key of key %s is missing" % life["key"])
            if entry == {"key": life["key"], "deleted": True}:
                self.deliveries.without_key(life["key"])
                continue
            need(set(entry) == {"key", "publicKey"}, "the public key of key %s is missing" % life["key"])
            public = rsa_public(b64(entry["publicKey"]))
            need(thumbprint(*public) == life.get("fingerprint"), "the public key of key %s is not the one that was created" % life["key"])
            self.public_keys += 1
            self.deliveries.check(self.manifest["origin"], life["key"], public)

    def covered(self):
        return self.outside is not None and self.outside[1] == self.tree.size

    def checked(self):
        """What was checked, in words for who has to rely on it."""
        yield "%d signed checkpoints, each by a key given; the tree of the events has each signed root at its size, the last at %d" % (self.signed, self.newest[0])
        yield "%d events, none missing, inserted, changed or moved; %s" % (
            self.tree.size, ", ".join("%s: %d" % (name, self.types[name]) for name in sorted(self.types)))
        yield "%d receipts, each the signature of a key given over its event" % self.with_receipt
        yield "the text of %d policies, each the one that events name by its hash" % len(self.policies)
        yield "the inventory: the lives of %d keys follow from the events" % len(self.inventory.order)
        if self.public_keys is not None:
            yield "%d public keys, each the one whose fingerprint the log has" % self.public_keys
            yield "%d receipts of sealed keys, each signed by the holder of the key that it is for" % self.deliveries.signed()
            yield "%d proofs of keys that their holders made, each signed by that key" % self.deliveries.proven
        yield "%d enrollments: their claims and keys keep to the uses, recipient, TPM, scope, origin and approval that were permitted, and no claim came behind the end" % len(self.deliveries.permitted)
        yield "the manifest: every member is there once, in its place, with its size and SHA-256"
        if self.covered():
            yield "the checkpoint given: it covers every event, so that the end is not cut off"
        elif self.outside:
            yield "the checkpoint given: the export agrees with it up to event %d" % self.outside[1]

    def unchecked(self):
        if not self.covered():
            yield "whether the log goes on behind event %d: only a checkpoint that covers the whole export, kept elsewhere, shows that (--checkpoint)" % self.tree.size
        if self.with_receipt < self.tree.size:
            yield "%d events have no receipt, so that Vault's word for them is not in the export" % (self.tree.size - self.with_receipt)
        unchecked = sum(known["receipt"] == "unchecked" for known in self.deliveries.known.values())
        if unchecked:
            yield "%d receipts of sealed keys, whose public keys are not in the export" % unchecked
        if self.deliveries.unproven():
            yield "%d proofs of keys that their holders made, whose public keys are not in the export: it was made without, or the keys were deleted before" % self.deliveries.unproven()
        if self.deliveries.in_part():
            yield "%d enrollments of which the log does not have all that was permitted; what it has was compared" % self.deliveries.in_part()
        yield "Vault's own audit file: \"orgkeys audit verify-export --vault-audit\" compares with it"
        yield "whether what the events say is so: times, actors and outcomes are the server's word"
        yield "decisions: they follow from the policy's text and each event, and were not recomputed"

    def result(self):
        return {
            "verified": True, "truncationExcluded": self.covered(), "origin": self.manifest["origin"], "events": self.tree.size,
            "root": base64.b64encode(self.tree.root()).decode(), "keys": len(self.inventory.order), "checkpoints": self.signed,
            "publicKeys": self.public_keys or 0, "enrolled": self.deliveries.told(),
            "proofs": self.deliveries.proven, "proofsUnchecked": self.deliveries.unproven(),
            "enrollments": len(self.deliveries.permitted), "termsUnchecked": self.deliveries.in_part(),
            "receipts": self.with_receipt, "types": self.types, "checked": list(self.checked()), "notChecked": list(self.unchecked()),
        }

    def report(self):
        print("verified: %d events, %d keys, root %s" % (self.tree.size, len(self.inventory.order), self.tree.root().hex()))
        for e in self.deliveries.told():
            print(enrolled(e))
        print("\nchecked:")
        for line in self.checked():
            print("  - " + line)
        print("\nnot checked:")
        for line in self.unchecked():
            print("  - " + line)
        print("\ntruncation %sexcluded" % ("" if self.covered() else "not "))


def read_text(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def read_keys(given):
    """Keys as they stand, or files with one a line."""
    found = []
    for text in given:
        for line in (read_text(text) if os.path.exists(text) else text).splitlines():
            if line.strip() and not line.startswith("#"):
                found.append(verifier_key(line.strip()))
    need(found, "there is no key in what --key names")
    return found


def read_checkpoint(text, keys):
    """The largest checkpoint of a signed note, or of a sink's lines."""
    if not text.lstrip().startswith("{"):
        return open_checkpoint(text, keys)
    notes = [parse(line) for line in text.split("\n") if line.strip()]
    opened = [open_checkpoint(note["checkpoint"], keys) for note in notes if isinstance(note, dict) and "\n\n" in str(note.get("checkpoint"))]
    need(opened, "what --checkpoint names holds no signed checkpoint")
    return max(opened, key=lambda c: c[1])


DAMAGED = (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, KeyError, TypeError, UnicodeError, RecursionError)


def arguments(argv):
    parser = argparse.ArgumentParser(usage=__doc__.split("\n\n")[1][len("usage: "):], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument("archive")
    parser.add_argument("--key", action="append", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--json", action="store_true")
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        sys.exit(0)
    return parser.parse_args(argv)


def prepare(args):
    """Reads what the archive is compared with."""
    try:
        keys = read_keys(args.key)
        given = read_text(args.checkpoint) if args.checkpoint else None
        open(args.archive, "rb").close()
    except (Wrong, OSError, ValueError) as err:
        sys.stderr.write("verify_export.py: %s\n" % err)
        sys.exit(2)
    return keys, given


def judge(v, path, checkpoint):
    """Returns the exit code and, unless the export verifies, why not."""
    try:
        if checkpoint is not None:
            v.outside = read_checkpoint(checkpoint, v.keys)
        v.run(path)
    except TooOld as err:
        return 4, "not judged: %s, which this program is too old to know; take the contrib/verify_export.py of the orgkeys that wrote the export" % err
    except Wrong as err:
        return 1, "wrong: %s" % err
    except DAMAGED as err:
        return 1, "wrong: it is damaged: %s: %s" % (type(err).__name__, err)
    return (0 if v.covered() else 3), None


def main(argv):
    args = arguments(argv)
    keys, checkpoint = prepare(args)
    v = Verifier(keys)
    code, why = judge(v, args.archive, checkpoint)
    if args.json:
        print(json.dumps(v.result() if why is None else {"verified": False, "truncationExcluded": False, "error": why}, sort_keys=True))
    elif why is None:
        v.report()
    else:
        sys.stderr.write(why + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
