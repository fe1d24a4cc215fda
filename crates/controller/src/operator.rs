//! Credentials of operators, issued on the machine that holds the certificate authority.

use anyhow::Context;
use std::path::{Path, PathBuf};
use std::time::Duration;
use weft_identity::ca::{CertificateAuthority, LEAF_LIFETIME_MAX};
use weft_identity::spiffe::{Role, Subject};
use weft_model::Name;

use crate::clock;
use crate::config::OperatorIssue;

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
    save(&authority, wanted.role, &wanted.name, wanted.ttl, &wanted.out)
}

/// Re-issues the admin credential that lies beside the authority: whoever can read one can read the other.
pub(crate) fn save_admin(authority: &CertificateAuthority, state_dir: &Path) -> anyhow::Result<PathBuf> {
    let dir = state_dir.join("operator").join("admin");
    let name: Name = "admin".parse().context("a constant name")?;
    save(authority, Role::Admin, &name, LEAF_LIFETIME_MAX, &dir)?;
    Ok(dir)
}

fn save(
    authority: &CertificateAuthority,
    role: Role,
    name: &Name,
    ttl: Duration,
    dir: &Path,
) -> anyhow::Result<()> {
    let subject = Subject::Operator { role, name: name.clone() };
    let credential =
        authority.issue_credential(&subject, clock::now(), ttl).context("cannot issue a credential")?;
    credential.save(dir).with_context(|| format!("cannot write the credential to {}", dir.display()))
}
