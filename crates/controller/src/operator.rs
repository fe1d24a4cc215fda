//! Credentials of operators, issued on the machine that holds the certificate authority.

use anyhow::Context;
use std::path::{Path, PathBuf};
use std::time::Duration;
use weft_identity::ca::{CertificateAuthority, LEAF_LIFETIME_MAX};
use weft_identity::credential::Credential;
use weft_identity::spiffe::{Role, Subject};
use weft_model::Timestamp;

use crate::clock;
use crate::config::OperatorIssue;
use crate::renewal::RENEW_MIDDLE;

/// Where the certificate authority is in a state directory.
pub(crate) fn authority_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("ca")
}

/// Issues what the command line asks for, and says where it is.
///
/// # Errors
/// If there is no authority in the state directory, or the credential cannot be written.
pub fn issue(wanted: &OperatorIssue) -> anyhow::Result<()> {
    let dir = authority_dir(&wanted.state_dir);
    let authority = CertificateAuthority::load(&dir).with_context(|| {
        format!(
            "no certificate authority in {}; start weft-controller with this state directory once",
            dir.display()
        )
    })?;
    let subject = Subject::Operator { role: wanted.role, name: wanted.name.clone() };
    save(&authority, &subject, clock::now(), wanted.ttl, &wanted.out).map(|_| ())
}

/// The admin credential that lies beside the authority: whoever can read one can read the other. Issued anew at every
/// start, and from half of its life.
#[derive(Debug)]
pub(crate) struct AdminCredential {
    dir: PathBuf,
    renew_at: Timestamp,
}

impl AdminCredential {
    pub(crate) fn issue(
        authority: &CertificateAuthority,
        state_dir: &Path,
        now: Timestamp,
    ) -> anyhow::Result<Self> {
        let mut admin = Self { dir: state_dir.join("operator").join("admin"), renew_at: now };
        admin.renew_if_due(authority, now)?;
        Ok(admin)
    }

    /// Where it is.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether it was due, and is issued anew.
    pub(crate) fn renew_if_due(
        &mut self,
        authority: &CertificateAuthority,
        now: Timestamp,
    ) -> anyhow::Result<bool> {
        if now < self.renew_at {
            return Ok(false);
        }
        let name = "admin".parse().context("a constant name")?;
        let subject = Subject::Operator { role: Role::Admin, name };
        let credential = save(authority, &subject, now, LEAF_LIFETIME_MAX, &self.dir)?;
        self.renew_at = credential.renew_at(RENEW_MIDDLE);
        Ok(true)
    }
}

fn save(
    authority: &CertificateAuthority,
    subject: &Subject,
    now: Timestamp,
    ttl: Duration,
    dir: &Path,
) -> anyhow::Result<Credential> {
    let credential = authority.issue_credential(subject, now, ttl).context("cannot issue a credential")?;
    credential.save(dir).with_context(|| format!("cannot write the credential to {}", dir.display()))?;
    Ok(credential)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_admin_credential_is_issued_anew_from_half_of_its_life() {
        const DAY: Duration = Duration::from_secs(86_400);
        let state = tempfile::tempdir().unwrap();
        let domain = "weft.test".parse().unwrap();
        let start = clock::now();
        let authority =
            CertificateAuthority::load_or_create(&authority_dir(state.path()), &domain, start).unwrap();
        let mut admin = AdminCredential::issue(&authority, state.path(), start).unwrap();
        let ends = |admin: &AdminCredential| Credential::load(admin.dir()).unwrap().expires_at();
        let first = ends(&admin);
        assert!(!admin.renew_if_due(&authority, start.after(14 * DAY)).unwrap());
        assert_eq!(ends(&admin), first);
        assert!(admin.renew_if_due(&authority, start.after(16 * DAY)).unwrap());
        assert!(ends(&admin).since(first) >= 15 * DAY);
    }
}
