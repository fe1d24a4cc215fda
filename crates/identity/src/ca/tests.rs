use super::store::{CaStoreError, ROOT_CERTIFICATE_FILE, ROOT_KEY_FILE};
use super::*;
use crate::fixture::{API, CONTROLLER, NOW, authority, credential, subject};
use rcgen::PublicKeyData;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use x509_parser::prelude::FromDer;

impl CertificateAuthority {
    /// Signs what no authority should.
    pub(crate) fn sign_anything(
        &self,
        params: &CertificateParams,
        key: &impl PublicKeyData,
    ) -> CertificateDer<'static> {
        params.signed_by(key, &self.issuer).unwrap().der().clone()
    }
}

fn requested(params: &CertificateParams) -> PublicKey {
    let key = KeyPair::generate().unwrap();
    PublicKey::from_csr(params.serialize_request(&key).unwrap().der()).unwrap()
}

#[test]
fn a_leaf_says_what_the_authority_decided() {
    let authority = authority();
    let key = requested(&CertificateParams::default());
    let leaf = authority.issue_leaf(&subject(API), &key, NOW, LEAF_LIFETIME).unwrap();

    let identity = &leaf.identity;
    assert_eq!(identity.id.to_string(), API);
    assert_eq!(identity.not_before, Timestamp(NOW.0 - 300_000));
    assert_eq!(identity.not_after, Timestamp(NOW.0 + 3_600_000));
    assert_eq!(identity.public_key_sha256, key.fingerprint());
    assert_eq!(identity.serial.len(), 2 * SERIAL_BYTES);

    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(&leaf.certificate).unwrap();
    assert!(parsed.basic_constraints().unwrap().unwrap().critical);
    assert!(parsed.key_usage().unwrap().unwrap().critical);
    assert_eq!(parsed.key_usage().unwrap().unwrap().value.flags, 1, "digitalSignature alone");
    assert_eq!(parsed.subject().iter_common_name().count(), 0);
    assert_eq!(dns_names(&leaf), ["api.default.weft", "*.api.default.weft"]);
    assert!(leaf.to_pem().starts_with("-----BEGIN CERTIFICATE-----\n"));
}

fn dns_names(leaf: &IssuedLeaf) -> Vec<String> {
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(&leaf.certificate).unwrap();
    let names = parsed.subject_alternative_name().unwrap().unwrap().value.general_names.iter();
    names
        .filter_map(|name| match name {
            x509_parser::extensions::GeneralName::DNSName(name) => Some((*name).to_owned()),
            _ => None,
        })
        .collect()
}

#[test]
fn who_is_no_instance_has_no_name_in_dns() {
    let key = requested(&CertificateParams::default());
    for id in [CONTROLLER, "spiffe://weft.test/operator/admin/ann"] {
        let leaf = authority().issue_leaf(&subject(id), &key, NOW, LEAF_LIFETIME).unwrap();
        assert_eq!(dns_names(&leaf), [""; 0], "{id}");
    }
}

#[test]
fn a_request_for_another_name_gets_the_authoritys() {
    let mut greedy = crate::fixture::leaf_params("spiffe://weft.test/operator/admin/mallory");
    greedy.subject_alt_names.push(SanType::DnsName("*.weft.test".try_into().unwrap()));
    greedy.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    greedy.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    greedy.distinguished_name.push(DnType::CommonName, "admin");
    let leaf = authority().issue_leaf(&subject(API), &requested(&greedy), NOW, LEAF_LIFETIME).unwrap();

    assert_eq!(leaf.identity.id.to_string(), API);
    for name in [b"mallory".as_slice(), b"*.weft.test", b"admin"] {
        assert!(!leaf.certificate.windows(name.len()).any(|bytes| bytes == name));
    }
}

#[test]
fn serial_numbers_do_not_repeat() {
    let authority = authority();
    let key = requested(&CertificateParams::default());
    let serial = || authority.issue_leaf(&subject(API), &key, NOW, LEAF_LIFETIME).unwrap().identity.serial;
    assert_ne!(serial(), serial());
}

#[test]
fn lifetimes_have_bounds_and_end_with_the_root() {
    let authority = authority();
    let key = requested(&CertificateParams::default());
    let issue = |now, lifetime| authority.issue_leaf(&subject(CONTROLLER), &key, now, lifetime);

    for lifetime in [Duration::ZERO, Duration::from_millis(999), LEAF_LIFETIME_MAX + Duration::from_secs(1)] {
        assert!(matches!(issue(NOW, lifetime), Err(IssueError::Lifetime { .. })), "{lifetime:?}");
    }
    let eve = Timestamp(authority.not_after().0 - 1000);
    assert_eq!(issue(eve, LEAF_LIFETIME).unwrap().identity.not_after, authority.not_after());
    for now in [authority.not_after(), Timestamp(NOW.0 - 300_001), Timestamp(0), Timestamp(i64::MAX)] {
        let error = issue(now, LEAF_LIFETIME).unwrap_err();
        assert!(matches!(error, IssueError::RootNotValid { .. }), "{now:?}");
        assert!(error.to_string().contains("from 2027-01-15 7:55:00"), "{error}");
    }
}

#[test]
fn a_clock_that_no_certificate_can_hold_is_an_error() {
    for now in [Timestamp(-1), Timestamp(0), Timestamp(i64::MAX), Timestamp(i64::MIN)] {
        let made = CertificateAuthority::create(&"weft.test".parse().unwrap(), now);
        assert!(matches!(made, Err(IssueError::Clock { .. })), "{now:?}");
    }
}

#[test]
fn the_holder_of_an_expired_leaf_is_recognized_for_a_while() {
    let authority = authority();
    let credential = credential(&authority, API);
    let key = PublicKey::from_csr(&credential.key().csr_der().unwrap()).unwrap();
    let (leaf, end) = (credential.leaf(), credential.expires_at());
    let recognize = |leaf, key, now| authority.recognize_expired(leaf, key, now);

    for now in [NOW, end.after(Duration::from_secs(1)), end.after(EXPIRED_GRACE)] {
        assert_eq!(recognize(leaf, &key, now).unwrap().id.to_string(), API, "{now:?}");
    }
    for now in [end.after(EXPIRED_GRACE + Duration::from_secs(1)), Timestamp(NOW.0 - 301_000)] {
        assert_eq!(recognize(leaf, &key, now), Err(RecognizeError::TooLate { not_after: end }), "{now:?}");
    }
    let other_key = requested(&CertificateParams::default());
    assert_eq!(recognize(leaf, &other_key, end), Err(RecognizeError::KeyMismatch));
    assert!(matches!(recognize(authority.root(), &key, end), Err(RecognizeError::Leaf(_))));
    let strangers = self::authority().issue_leaf(&subject(API), &key, NOW, LEAF_LIFETIME).unwrap();
    assert!(matches!(recognize(&strangers.certificate, &key, end), Err(RecognizeError::Untrusted(_))));
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn an_authority_survives_on_disk_with_a_private_key() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("state/ca");
    let domain = "weft.test".parse().unwrap();
    let made = CertificateAuthority::load_or_create(&dir, &domain, NOW).unwrap();
    let found = CertificateAuthority::load_or_create(&dir, &domain, NOW).unwrap();
    assert_eq!(made.root(), found.root());
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&dir.join(ROOT_KEY_FILE)), 0o600);
    assert_eq!(mode(&dir.join(ROOT_CERTIFICATE_FILE)), 0o644);
    assert_eq!(fs::read_dir(parent.path().join("state")).unwrap().count(), 1, "nothing is left behind");

    // What the one issues, the holder of the other's root accepts.
    let credential = found.issue_credential(&subject(API), NOW, LEAF_LIFETIME).unwrap();
    credential.with_roots(vec![made.root().clone()]).unwrap();
}

#[test]
fn an_authority_is_never_overwritten() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("ca");
    authority().save(&dir).unwrap();
    let before = fs::read(dir.join(ROOT_KEY_FILE)).unwrap();
    assert!(matches!(authority().save(&dir), Err(CaStoreError::Exists { .. })));

    // A lost half is an error, never a reason for a new root.
    fs::remove_file(dir.join(ROOT_CERTIFICATE_FILE)).unwrap();
    let again = CertificateAuthority::load_or_create(&dir, &"weft.test".parse().unwrap(), NOW);
    assert!(matches!(again, Err(CaStoreError::File(error)) if error.is_absent()));
    assert_eq!(fs::read(dir.join(ROOT_KEY_FILE)).unwrap(), before);
}

#[test]
fn of_many_that_start_at_once_one_makes_the_root() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("ca");
    let domain = "weft.test".parse().unwrap();
    let roots: Vec<_> = std::thread::scope(|scope| {
        let start = || CertificateAuthority::load_or_create(&dir, &domain, NOW).unwrap().root_fingerprint();
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(roots.iter().all(|root| *root == roots[0]), "{roots:?}");
}

#[test]
fn damaged_files_are_refused_by_name() {
    let parent = tempfile::tempdir().unwrap();
    let fresh = |name: &str| {
        let dir = parent.path().join(name);
        authority().save(&dir).unwrap();
        dir
    };
    let refusal = |dir: &Path| CertificateAuthority::load(dir).unwrap_err();

    let dir = fresh("exposed");
    fs::set_permissions(dir.join(ROOT_KEY_FILE), fs::Permissions::from_mode(0o640)).unwrap();
    assert!(matches!(refusal(&dir), CaStoreError::File(crate::FileError::Exposed { mode: 0o640, .. })));

    for (file, content) in [(ROOT_KEY_FILE, "x"), (ROOT_CERTIFICATE_FILE, "x"), (ROOT_CERTIFICATE_FILE, "")] {
        let dir = fresh(&format!("malformed-{file}-{}", content.len()));
        fs::write(dir.join(file), content).unwrap();
        let error = refusal(&dir);
        assert!(matches!(&error, CaStoreError::Malformed { path, .. } if path.ends_with(file)), "{error}");
    }

    let (one, other) = (fresh("one"), fresh("other"));
    fs::copy(one.join(ROOT_KEY_FILE), other.join(ROOT_KEY_FILE)).unwrap();
    assert!(matches!(refusal(&other), CaStoreError::KeyMismatch { .. }));

    let elsewhere = CertificateAuthority::load_or_create(&one, &"other.test".parse().unwrap(), NOW);
    assert!(matches!(elsewhere, Err(CaStoreError::TrustDomain { .. })));
}

#[test]
fn no_text_shows_the_key() {
    let authority = authority();
    let der = authority.issuer.key().0.serialized_der();
    let text = format!("{authority:?} {authority:#?}");
    assert!(!text.contains(&hex::encode(&der[der.len() - 16..])));
    assert!(text.len() < 400, "{text}");
}
