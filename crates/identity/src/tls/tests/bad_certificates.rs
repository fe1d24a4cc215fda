//! Certificates that must not open a connection, each with the reason that is told. Every one is presented twice: by a
//! client to a sidecar, and by a server to a sidecar.

use super::{ALPN, Clock, client_for, server, tls};
use crate::certificate::{PeerIdentity, PeerIdentityError};
use crate::fixture::{API, DB, NOW, authority, credential, handshake, leaf_params, set_validity};
use crate::tls::{ExpectedPeer, HandshakeFault, PeerRejection, TlsIdentity};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::crypto::aws_lc_rs;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, Error, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::Arc;
use std::time::Duration;
use weft_model::time::Timestamp;

const SUBJECT_ALT_NAME: &[u64] = &[2, 5, 29, 17];

/// What a sidecar says of the peer: the rule for leaves that is broken, or else the fault.
fn reason(error: &Error) -> String {
    match PeerRejection::of_rustls(error) {
        Some(PeerRejection::Certificate(PeerIdentityError::SpiffeId(rule))) => format!("{rule:?}"),
        Some(PeerRejection::Certificate(rule)) => format!("{rule:?}"),
        _ => HandshakeFault::of_rustls(error).to_string(),
    }
}

/// Presents a chain with a key to a sidecar, as client and as server, and returns the reasons of the two refusals.
fn present(sidecar: &TlsIdentity, chain: Vec<CertificateDer<'static>>, key: &KeyPair) -> [String; 2] {
    let key = any_supported_type(&PrivateKeyDer::Pkcs8(key.serialized_der().into())).unwrap();
    let presented = Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain, key)));
    let provider = Arc::new(aws_lc_rs::default_provider());

    let mut client = ClientConfig::clone(&client_for(sidecar, DB));
    client.client_auth_cert_resolver = presented.clone();
    let honest = tls(credential_of(sidecar));
    let as_client = handshake(&Arc::new(client), &server(&honest)).server.unwrap_err();

    let bad_server = ServerConfig::builder_with_details(provider, Clock::at(NOW))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(presented);
    let good_client = sidecar.client_config(ExpectedPeer::AnyInstance, ALPN);
    let as_server = handshake(&good_client, &Arc::new(bad_server)).client.unwrap_err();
    [reason(&as_client), reason(&as_server)]
}

fn credential_of(sidecar: &TlsIdentity) -> crate::credential::Credential {
    sidecar.current().with_roots(sidecar.current().roots().to_vec()).unwrap()
}

type Spoil = fn(&mut CertificateParams);

fn uri(params: &mut CertificateParams, uri: &str) {
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
}

/// A subjectAltName extension whose one URI is these bytes.
fn raw_uri(bytes: &[u8]) -> CustomExtension {
    let length = u8::try_from(bytes.len()).unwrap();
    let der = [&[0x30, length + 2, 0x86, length], bytes].concat();
    CustomExtension::from_oid_content(SUBJECT_ALT_NAME, der)
}

/// What is signed by the right root and still must not pass, and the reason.
const SPOILED: &[(&str, Spoil, &str)] = &[
    ("expired", |p| set_validity(p, Timestamp(NOW.0 - 9000), Timestamp(NOW.0 - 1000)), "peer_expired"),
    (
        "not yet valid",
        |p| set_validity(p, Timestamp(NOW.0 + 1000), Timestamp(NOW.0 + 9000)),
        "peer_not_yet_valid",
    ),
    ("ends before it starts", |p| set_validity(p, NOW, Timestamp(NOW.0 - 1000)), "peer_expired"),
    ("no names", |p| p.subject_alt_names.clear(), "NoUri"),
    (
        "common name only",
        |p| {
            p.subject_alt_names.clear();
            p.distinguished_name.push(DnType::CommonName, API);
        },
        "NoUri",
    ),
    ("DNS name only", |p| p.subject_alt_names = vec![SanType::DnsName("api".try_into().unwrap())], "NoUri"),
    (
        "mail address only",
        |p| p.subject_alt_names = vec![SanType::Rfc822Name("api@weft.test".try_into().unwrap())],
        "NoUri",
    ),
    (
        "two URIs",
        |p| p.subject_alt_names.push(SanType::URI(DB.try_into().unwrap())),
        "SeveralUris { count: 2 }",
    ),
    (
        "the same URI twice",
        |p| p.subject_alt_names.push(SanType::URI(API.try_into().unwrap())),
        "SeveralUris { count: 2 }",
    ),
    (
        "a second URI that is no SPIFFE id",
        |p| p.subject_alt_names.push(SanType::URI("https://weft.test/".try_into().unwrap())),
        "SeveralUris { count: 2 }",
    ),
    ("another scheme", |p| uri(p, "https://weft.test/ns/default/svc/api/inst/api-1"), "Scheme"),
    ("upper case scheme", |p| uri(p, "SPIFFE://weft.test/ns/default/svc/api/inst/api-1"), "Scheme"),
    ("upper case domain", |p| uri(p, "spiffe://Weft.test/ns/default/svc/api/inst/api-1"), "TrustDomain"),
    ("port in the domain", |p| uri(p, "spiffe://weft.test:1/ns/default/svc/api/inst/api-1"), "TrustDomain"),
    ("user in the domain", |p| uri(p, "spiffe://x@weft.test/ns/default/svc/api/inst/api-1"), "TrustDomain"),
    ("no domain", |p| uri(p, "spiffe:///ns/default/svc/api/inst/api-1"), "TrustDomain"),
    ("upper case name", |p| uri(p, "spiffe://weft.test/ns/default/svc/API/inst/api-1"), "Name"),
    ("percent", |p| uri(p, "spiffe://weft.test/ns/default/svc/%61pi/inst/api-1"), "Name"),
    ("dot segment", |p| uri(p, "spiffe://weft.test/ns/default/svc/../inst/api-1"), "Name"),
    ("query", |p| uri(p, "spiffe://weft.test/ns/default/svc/api/inst/api-1?x"), "Name"),
    ("fragment", |p| uri(p, "spiffe://weft.test/ns/default/svc/api/inst/api-1#x"), "Name"),
    ("NUL", |p| uri(p, "spiffe://weft.test/ns/default/svc/api/inst/api-1\0"), "Name"),
    ("line break", |p| uri(p, "spiffe://weft.test/ns/default/svc/api/inst/api-1\n"), "Name"),
    ("trailing slash", |p| uri(p, "spiffe://weft.test/ns/default/svc/api/inst/api-1/"), "Path"),
    ("empty segment", |p| uri(p, "spiffe://weft.test//ns/default/svc/api/inst/api-1"), "Path"),
    ("domain alone", |p| uri(p, "spiffe://weft.test"), "Path"),
    ("service without instance", |p| uri(p, "spiffe://weft.test/ns/default/svc/api"), "Path"),
    ("another mesh's form", |p| uri(p, "spiffe://weft.test/ns/default/sa/api"), "Path"),
    ("unknown role", |p| uri(p, "spiffe://weft.test/operator/root/ann"), "Path"),
    ("longer than a SPIFFE id", |p| uri(p, &format!("{API}{}", "a".repeat(2048))), "TooLong { bytes: 2096 }"),
    (
        "larger than a certificate",
        |p| uri(p, &format!("{API}{}", "a".repeat(crate::certificate::CERTIFICATE_BYTES_MAX))),
        "TooLarge",
    ),
    (
        "not ASCII",
        |p| {
            p.subject_alt_names.clear();
            p.custom_extensions = vec![raw_uri("spiffe://weft.test/controller/ç".as_bytes())];
        },
        "Name",
    ),
    (
        "not UTF-8",
        |p| {
            p.subject_alt_names.clear();
            p.custom_extensions = vec![raw_uri(b"spiffe://weft.test/controller/\xe7")];
        },
        "Malformed",
    ),
    ("names twice", |p| p.custom_extensions = vec![raw_uri(DB.as_bytes())], "peer_untrusted"),
    (
        "unknown critical extension",
        |p| {
            let mut extension = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![5, 0]);
            extension.set_criticality(true);
            p.custom_extensions = vec![extension];
        },
        "peer_untrusted",
    ),
    ("an authority's", |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained), "peer_untrusted"),
    ("silent about being an authority", |p| p.is_ca = IsCa::NoCa, "Authority"),
    ("no extended key usage", |p| p.extended_key_usages.clear(), "ExtendedKeyUsage"),
    (
        "for servers only",
        |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth],
        "ExtendedKeyUsage",
    ),
    (
        "for clients only",
        |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth],
        "peer_untrusted",
    ),
    (
        "for signing code",
        |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning],
        "peer_untrusted",
    ),
    ("no key usage", |p| p.key_usages.clear(), "KeyUsage"),
    ("for encryption", |p| p.key_usages = vec![KeyUsagePurpose::KeyEncipherment], "KeyUsage"),
    ("may sign certificates", |p| p.key_usages.push(KeyUsagePurpose::KeyCertSign), "KeyUsage"),
    ("may sign revocation lists", |p| p.key_usages.push(KeyUsagePurpose::CrlSign), "KeyUsage"),
    (
        "another trust domain under the right root",
        |p| uri(p, "spiffe://other.test/ns/default/svc/api/inst/api-1"),
        "peer_wrong_identity",
    ),
    ("a controller's", |p| uri(p, "spiffe://weft.test/controller/c1"), "peer_wrong_identity"),
    ("an operator's", |p| uri(p, "spiffe://weft.test/operator/admin/ann"), "peer_wrong_identity"),
];

#[test]
fn what_the_right_root_signed_by_mistake_is_refused_with_its_reason() {
    let authority = authority();
    let sidecar = tls(credential(&authority, DB));
    let key = KeyPair::generate().unwrap();
    for (name, spoil, wanted) in SPOILED {
        let mut params = leaf_params(API);
        spoil(&mut params);
        let leaf = authority.sign_anything(&params, &key);
        for reason in present(&sidecar, vec![leaf], &key) {
            assert!(reason.starts_with(wanted), "{name}: {reason}, not {wanted}");
        }
    }
}

#[test]
fn what_another_hand_signed_is_untrusted() {
    let (authority, stranger) = (authority(), authority());
    let sidecar = tls(credential(&authority, DB));
    let key = KeyPair::generate().unwrap();
    let params = leaf_params(API);
    let good = authority.sign_anything(&params, &key);

    let self_signed = params.self_signed(&key).unwrap().der().clone();
    let foreign = stranger.sign_anything(&params, &key);
    // An intermediate of the right root: there are none in the mesh, and the root says so.
    let middle_key = KeyPair::generate().unwrap();
    let mut middle_params = CertificateParams::default();
    middle_params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    set_validity(&mut middle_params, NOW, NOW.after(Duration::from_secs(3600)));
    let middle = authority.sign_anything(&middle_params, &middle_key);
    let issuer = rcgen::Issuer::new(middle_params, &middle_key);
    let below = params.signed_by(&key, &issuer).unwrap().der().clone();
    let mut tampered = good.to_vec();
    let last = tampered.len() - 1;
    tampered[last] ^= 1;

    for (name, chain, key) in [
        ("self-signed", vec![self_signed.clone()], &key),
        ("self-signed beside the root", vec![self_signed, authority.root().clone()], &key),
        ("another root", vec![foreign.clone()], &key),
        ("another root, sent along", vec![foreign, stranger.root().clone()], &key),
        ("below an intermediate", vec![below, middle, authority.root().clone()], &key),
        ("tampered with", vec![CertificateDer::from(tampered)], &key),
        ("the root itself", vec![authority.root().clone()], &key),
        ("not a certificate", vec![CertificateDer::from(vec![0x30, 0])], &key),
        ("stolen, without its key", vec![good.clone()], &KeyPair::generate().unwrap()),
    ] {
        assert_eq!(present(&sidecar, chain, key), ["peer_untrusted", "peer_untrusted"], "{name}");
    }

    // The same leaf with its own key is what passes, so each case above fails for its own reason.
    let client = {
        let key = any_supported_type(&PrivateKeyDer::Pkcs8(key.serialized_der().into())).unwrap();
        let mut client = ClientConfig::clone(&client_for(&sidecar, DB));
        client.client_auth_cert_resolver =
            Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![good], key)));
        client
    };
    handshake(&Arc::new(client), &server(&tls(credential_of(&sidecar)))).server.unwrap();
}

#[test]
fn weak_and_odd_keys_are_refused() {
    let authority = authority();
    for algorithm in [&rcgen::PKCS_RSA_SHA256, &rcgen::PKCS_ECDSA_P521_SHA512] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let leaf = authority.sign_anything(&leaf_params(API), &key);
        assert_eq!(PeerIdentity::from_certificate(&leaf), Err(PeerIdentityError::KeyAlgorithm));
    }
}

#[test]
fn a_long_chain_is_refused_like_a_short_one() {
    let authority = authority();
    let sidecar = tls(credential(&authority, DB));
    let key = KeyPair::generate().unwrap();
    let foreign = crate::fixture::authority().sign_anything(&leaf_params(API), &key);
    let chain = vec![foreign; 60];
    assert_eq!(present(&sidecar, chain, &key), ["peer_untrusted", "peer_untrusted"]);
}
