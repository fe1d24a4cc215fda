use super::*;
use crate::ca::{BACKDATE, LEAF_LIFETIME};
use crate::fixture::{API, CONTROLLER, DB, NOW, authority, credential, subject};
use proptest::prelude::*;
use std::fs;
use std::os::unix::fs::PermissionsExt;

#[test]
fn a_credential_survives_on_disk_in_one_private_file() {
    let authority = authority();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("identity");
    assert!(Credential::load(&dir).unwrap_err().is_absent());

    for id in [API, CONTROLLER] {
        let kept = credential(&authority, id);
        kept.save(&dir).unwrap();
        let found = Credential::load(&dir).unwrap();
        assert_eq!(found.identity(), kept.identity());
        assert_eq!(found.roots(), kept.roots());
    }
    let mode = fs::metadata(dir.join(CREDENTIAL_FILE)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let (ours, theirs) = (authority(), authority());
    let api = credential(&ours, API);
    let (leaf, key, root) = (api.leaf().clone(), api.key.clone(), ours.root().clone());
    let foreign_mesh = ca::CertificateAuthority::create(&"other.test".parse().unwrap(), NOW).unwrap();
    let refusal = |leaf: &CertificateDer<'static>, key: &LeafKey, roots: Vec<_>| {
        Credential::new(leaf.clone(), key.clone(), roots).unwrap_err()
    };

    let other_key = credential(&ours, DB).key.clone();
    assert!(matches!(refusal(&leaf, &other_key, vec![root.clone()]), CredentialError::KeyMismatch));
    let other_root = vec![theirs.root().clone()];
    assert!(matches!(refusal(&leaf, &key, other_root), CredentialError::Untrusted(_)));
    assert!(matches!(refusal(&leaf, &key, vec![]), CredentialError::RootCount { count: 0 }));
    let many = vec![root.clone(); ROOTS_MAX + 1];
    assert!(
        matches!(refusal(&leaf, &key, many), CredentialError::RootCount { count } if count == ROOTS_MAX + 1)
    );
    let not_a_root = vec![root.clone(), leaf.clone()];
    assert!(matches!(refusal(&leaf, &key, not_a_root), CredentialError::Root { index: 1 }));
    let foreign = vec![root.clone(), foreign_mesh.root().clone()];
    assert!(matches!(refusal(&leaf, &key, foreign), CredentialError::Root { index: 1 }));
    assert!(matches!(refusal(&root, &key, vec![root.clone()]), CredentialError::Leaf(_)));
    // Two roots of one mesh are what a rotation needs.
    Credential::new(leaf, key, vec![theirs.root().clone(), root]).unwrap();
}

#[test]
fn a_damaged_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    credential(&authority(), API).save(dir.path()).unwrap();
    let path = dir.path().join(CREDENTIAL_FILE);
    let good = fs::read_to_string(&path).unwrap();
    let certificates = good.find("-----BEGIN CERTIFICATE").unwrap();
    for (bad, what) in [
        ("", "empty"),
        (&good[..certificates], "no certificate"),
        (&good[certificates..], "no key"),
        (&good[..good.len() / 2], "cut"),
    ] {
        fs::write(&path, bad).unwrap();
        assert!(matches!(Credential::load(dir.path()), Err(CredentialError::Malformed { .. })), "{what}");
    }
    fs::write(&path, &good).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(
        Credential::load(dir.path()),
        Err(CredentialError::File(FileError::Exposed { mode: 0o644, .. }))
    ));
}

#[test]
fn no_text_shows_the_key() {
    let credential = credential(&authority(), API);
    let pem = credential.key.to_pem();
    let text = format!("{credential:?} {credential:#?}");
    assert!(text.contains(API));
    for line in pem.lines() {
        assert!(!text.contains(line), "{line}");
    }
}

#[test]
fn renewal_is_at_half_of_the_life_whatever_the_backdating() {
    let authority = authority();
    for lifetime in [LEAF_LIFETIME, Duration::from_secs(2), Duration::from_secs(30 * 86_400)] {
        let credential = authority.issue_credential(&subject(API), NOW, lifetime).unwrap();
        let after = |random| credential.renew_at(random).since(NOW);
        let tolerance = Duration::from_millis(1);
        assert!(after(0).abs_diff(lifetime * 4 / 10) <= tolerance);
        assert!(after(u32::MAX / 2).abs_diff(lifetime / 2) <= tolerance);
        assert!(after(u32::MAX).abs_diff(lifetime * 6 / 10) <= tolerance);
    }
    assert!(
        BACKDATE > Duration::from_secs(2),
        "the case of a leaf shorter than the backdating is among these"
    );
}

proptest! {
    #[test]
    fn a_damaged_file_never_panics(at in 0_usize..1500, byte in any::<u8>()) {
        let dir = tempfile::tempdir().unwrap();
        credential(&authority(), API).save(dir.path()).unwrap();
        let path = dir.path().join(CREDENTIAL_FILE);
        let mut bytes = fs::read(&path).unwrap();
        let at = at % bytes.len();
        bytes[at] = byte;
        fs::write(&path, &bytes).unwrap();
        if let Ok(found) = Credential::load(dir.path()) {
            prop_assert_eq!(found.spiffe_id().to_string(), API);
        }
    }
}
