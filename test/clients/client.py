# A workload in Python. It knows gRPC (Debian's python3-grpcio), the messages of
# the Workload API from a FileDescriptorSet, and nothing of spiffed.
#
#   client.py SOCKET DESCRIPTORS SPIFFE-ID   a process that has this one identity
#   client.py SOCKET DESCRIPTORS -           a process that has none
#
# It says what it waits for on standard output, and ends with a traceback at the
# first thing that is not as the standards say.
import base64
import json
import sys
import time

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

socket, descriptors, identity = sys.argv[1:]
HEADER = (("workload.spiffe.io", "true"),)
TIMEOUT = 20  # seconds

pool = descriptor_pool.DescriptorPool()
with open(descriptors, "rb") as f:
    for file in descriptor_pb2.FileDescriptorSet.FromString(f.read()).file:
        pool.Add(file)
messages = message_factory.MessageFactory(pool)
service = pool.FindServiceByName("SpiffeWorkloadAPI")
channel = grpc.insecure_channel("unix://" + socket)


def message(name, **fields):
    return messages.GetPrototype(pool.FindMessageTypeByName(name))(**fields)


def method(name, streams):
    """A callable for a method of the Workload API, and its request's class."""
    m = service.FindMethodByName(name)
    make = channel.unary_stream if streams else channel.unary_unary
    return make(
        "/SpiffeWorkloadAPI/" + name,
        request_serializer=lambda r: r.SerializeToString(),
        response_deserializer=messages.GetPrototype(m.output_type).FromString,
    )


calls = [  # all that the Workload API has, with a request that is good in itself
    ("FetchX509SVID", True, message("X509SVIDRequest")),
    ("FetchX509Bundles", True, message("X509BundlesRequest")),
    ("FetchJWTSVID", False, message("JWTSVIDRequest", audience=["test"])),
    ("FetchJWTBundles", True, message("JWTBundlesRequest")),
    ("ValidateJWTSVID", False, message("ValidateJWTSVIDRequest", audience="test", svid="a.b.c")),
]


def refused(want, name, streams, request, metadata):
    try:
        answer = method(name, streams)(request, timeout=TIMEOUT, metadata=metadata)
        if streams:
            next(answer)
    except grpc.RpcError as err:
        assert err.code() == want, f"{name} with {metadata}: {err.code()} {err.details()}, want {want}"
    else:
        raise AssertionError(f"{name} with {metadata} was answered, want {want}")


def say(text):
    print(text, flush=True)


def certificates(der):
    """Certificates that stand one after the other (Workload API, X509SVID)."""
    found = []
    while der:
        length, head = der[1], 2
        if length & 0x80:
            head += length & 0x7F
            length = int.from_bytes(der[2:head], "big")
        found.append(x509.load_der_x509_certificate(der[: head + length]))
        der = der[head + length :]
    return found


def signed_by(cert, issuer):
    issuer.public_key().verify(cert.signature, cert.tbs_certificate_bytes, ec.ECDSA(cert.signature_hash_algorithm))
    assert cert.issuer == issuer.subject, (cert.issuer, issuer.subject)


def checked(svids):
    """Checks an answer of FetchX509SVID, and returns the leaf's serial number."""
    assert [s.spiffe_id for s in svids.svids] == [identity], svids.svids
    svid = svids.svids[0]
    chain, roots = certificates(svid.x509_svid), certificates(svid.bundle)
    uris = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert uris.get_values_for_type(x509.UniformResourceIdentifier) == [identity], uris
    key = serialization.load_der_private_key(svid.x509_svid_key, password=None)
    assert key.public_key().public_numbers() == chain[0].public_key().public_numbers(), "the key is of another certificate"
    for cert, issuer in zip(chain, chain[1:]):
        signed_by(cert, issuer)
    root = [r for r in roots if r.subject == chain[-1].issuer][0]
    signed_by(chain[-1], root)
    return chain[0].serial_number


def unbase64(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def checked_token(token, jwks):
    head, payload, signature = token.split(".")
    header, claims = json.loads(unbase64(head)), json.loads(unbase64(payload))
    (jwk,) = [k for k in json.loads(jwks)["keys"] if k["kid"] == header["kid"]]
    assert header["alg"] == "ES256" and jwk["crv"] == "P-256", (header, jwk)
    public = ec.EllipticCurvePublicNumbers(
        int.from_bytes(unbase64(jwk["x"]), "big"), int.from_bytes(unbase64(jwk["y"]), "big"), ec.SECP256R1()
    ).public_key()
    raw = unbase64(signature)
    der = utils.encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    public.verify(der, f"{head}.{payload}".encode(), ec.ECDSA(hashes.SHA256()))
    assert claims["sub"] == identity and claims["exp"] > time.time(), claims
    assert claims["aud"] in ("test", ["test"]), claims


for name, streams, request in calls:
    for wrong in ((), (("workload.spiffe.io", "True"),)):
        refused(grpc.StatusCode.INVALID_ARGUMENT, name, streams, request, wrong)

if identity == "-":
    for name, streams, request in calls[:4]:
        refused(grpc.StatusCode.PERMISSION_DENIED, name, streams, request, HEADER)
    refused(grpc.StatusCode.INVALID_ARGUMENT, *calls[4], HEADER)  # whoever it is may have a token judged
    say("done")
    sys.exit()

stream = method("FetchX509SVID", True)(calls[0][2], timeout=TIMEOUT, metadata=HEADER)
answer = next(stream)
serial = checked(answer)
domain = "/".join(identity.split("/")[:3])

bundles = next(method("FetchX509Bundles", True)(calls[1][2], timeout=TIMEOUT, metadata=HEADER)).bundles
assert dict(bundles) == {domain: answer.svids[0].bundle}, bundles

tokens = method("FetchJWTSVID", False)(calls[2][2], timeout=TIMEOUT, metadata=HEADER).svids
assert [t.spiffe_id for t in tokens] == [identity], tokens
keys = next(method("FetchJWTBundles", True)(calls[3][2], timeout=TIMEOUT, metadata=HEADER)).bundles
assert list(keys) == [domain], keys
checked_token(tokens[0].svid, keys[domain])

validate = method("ValidateJWTSVID", False)
valid = validate(message("ValidateJWTSVIDRequest", audience="test", svid=tokens[0].svid), timeout=TIMEOUT, metadata=HEADER)
claims = json_format.MessageToDict(valid.claims)
assert valid.spiffe_id == identity and claims["sub"] == identity and claims["aud"] in ("test", ["test"]), (valid, claims)
other = message("ValidateJWTSVIDRequest", audience="other", svid=tokens[0].svid)
refused(grpc.StatusCode.INVALID_ARGUMENT, "ValidateJWTSVID", False, other, HEADER)

say("waits for a rotation")
assert checked(next(stream)) != serial, "an answer, and the same SVID"
say("done")
