//! Which mesh a command is about: a small file that says where its controllers are and who we are there.
//!
//! `weft up` writes it. It is found through `--context`, else `WEFT_CONTEXT`, else as `.weft/context.json` in the
//! current folder or the nearest one above that has it.

use crate::failure::{Failure, Outcome, chain};
use crate::output::time::{ago, now_ms, point};
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};
use tonic::transport::Channel;
use weft_client::ControllerAddress;
use weft_identity::credential::Credential;
use weft_identity::tls::{ExpectedPeer, TlsIdentity};
use weft_localmesh::home::{CONTEXT_FILE, HOME_DIR};
use weft_proto::v1::mesh_client::MeshClient;

/// Largest message that is taken from a controller: a full page of the log, or the status of a large mesh.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// `--context`, on every command that talks to a mesh.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ContextArgs {
    /// Where the mesh is and who we are there [default: the nearest .weft/context.json]
    #[arg(long, global = true, env = "WEFT_CONTEXT", value_name = "FILE")]
    pub(crate) context: Option<PathBuf>,
}

/// What the file says. Relative paths in it start at its folder.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ContextFile {
    controllers: Vec<String>,
    credential_dir: PathBuf,
    #[serde(default)]
    reader_url_file: Option<PathBuf>,
}

/// A mesh that commands can talk to.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    file: PathBuf,
    controllers: Vec<ControllerAddress>,
    credential_dir: PathBuf,
    reader_url_file: Option<PathBuf>,
}

impl ContextArgs {
    /// Reads the context.
    ///
    /// # Errors
    /// There is none, or it does not make sense.
    pub(crate) fn load(&self) -> Outcome<Context> {
        let file = match &self.context {
            Some(file) => file.clone(),
            None => nearest()?,
        };
        let wrong = |why: String| {
            Failure::fault(format!("the context {} cannot be used: {why}", file.display()))
                .next("start a local mesh with `weft up`, which writes one, or name another with --context")
        };
        let text = fs::read_to_string(&file).map_err(|error| wrong(error.to_string()))?;
        let content: ContextFile = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        let controllers = content.controllers.iter().map(|address| address.parse()).collect::<Result<_, _>>();
        let base = file.parent().unwrap_or(Path::new("")).to_owned();
        Ok(Context {
            controllers: controllers.map_err(|error: weft_client::AddressError| wrong(error.to_string()))?,
            credential_dir: base.join(content.credential_dir),
            reader_url_file: content.reader_url_file.map(|file| base.join(file)),
            file,
        })
    }
}

/// The context of the current folder or the nearest one above it.
fn nearest() -> Outcome<PathBuf> {
    let here = std::env::current_dir().map_err(|error| Failure::from_error(&error))?;
    nearest_to(&here).ok_or_else(|| {
        Failure::fault(format!(
            "no mesh is known here: there is no {HOME_DIR}/{CONTEXT_FILE} in {} or above",
            here.display()
        ))
        .next("start a local mesh with `weft up`, or name another mesh with --context or WEFT_CONTEXT")
    })
}

/// The same for a folder, if there is one.
pub(crate) fn nearest_to(folder: &Path) -> Option<PathBuf> {
    folder.ancestors().map(|dir| dir.join(HOME_DIR).join(CONTEXT_FILE)).find(|file| file.is_file())
}

impl Context {
    /// The file that it was read from.
    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    /// Where the controllers are, for messages.
    pub(crate) fn controllers(&self) -> String {
        self.controllers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    }

    /// A client that connects when it is first used.
    ///
    /// # Errors
    /// There is no usable credential, or it has expired.
    pub(crate) fn client(&self) -> Outcome<MeshClient<Channel>> {
        let tls = self.operator()?.client_config(ExpectedPeer::Controller, weft_client::ALPN);
        let channel = weft_client::channel(self.controllers.clone(), tls);
        Ok(MeshClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX))
    }

    /// The mesh, for a fleet of simulated sidecars.
    ///
    /// # Errors
    /// There is no usable credential, or it has expired.
    pub(crate) fn mesh(&self) -> Outcome<weft_fleet::Mesh> {
        Ok(weft_fleet::Mesh { controllers: self.controllers.clone(), operator: self.operator()? })
    }

    /// Who we are.
    fn operator(&self) -> Outcome<TlsIdentity> {
        let credential = Credential::load(&self.credential_dir).map_err(|error| {
            Failure::fault(format!(
                "there is no usable credential in {}: {}",
                self.credential_dir.display(),
                chain(&error)
            ))
            .next("start the mesh with `weft up`, or issue one with `weft-controller operator issue`")
        })?;
        self.check_lifetime(&credential, now_ms())?;
        Ok(TlsIdentity::new(credential))
    }

    /// Told here, since a controller that refuses an expired leaf in the handshake looks like one that is not there.
    fn check_lifetime(&self, credential: &Credential, now_ms: i64) -> Outcome<()> {
        let end_ms = credential.expires_at().0;
        if now_ms <= end_ms {
            return Ok(());
        }
        let dir = self.credential_dir.display();
        Err(Failure::fault(format!(
            "the credential in {dir} expired {}, at {}",
            ago(now_ms, end_ms),
            point(end_ms)
        ))
        .next(
            "issue another one with `weft-controller operator issue`; a local mesh issues one when it starts: \
             press Ctrl-C and run `weft up` again",
        ))
    }

    /// The database as a reader may see it.
    ///
    /// # Errors
    /// The context names none, or its file does not hold a URL.
    pub(crate) fn reader(&self) -> Outcome<tokio_postgres::Config> {
        // The URL holds a password, so it is in no message.
        self.reader_url()?.parse().map_err(|_| self.no_reader("it is not a PostgreSQL URL"))
    }

    /// The same, as text.
    ///
    /// # Errors
    /// The context names none, or its file cannot be read.
    pub(crate) fn reader_url(&self) -> Outcome<String> {
        let Some(file) = &self.reader_url_file else {
            return Err(self.no_reader("the context names none; add reader_url_file"));
        };
        let text = fs::read_to_string(file).map_err(|error| self.no_reader(&error.to_string()))?;
        Ok(text.trim().to_owned())
    }

    fn no_reader(&self, why: &str) -> Failure {
        let file = self.reader_url_file.as_ref().unwrap_or(&self.file);
        Failure::fault(format!("the reader's database URL in {} cannot be used: {why}", file.display()))
            .next("write a PostgreSQL URL of a role that is a member of weft_reader, or run `weft up` again")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use weft_identity::ca::CertificateAuthority;
    use weft_identity::spiffe::SpiffeId;
    use weft_model::Timestamp;

    #[test]
    fn an_expired_credential_is_told_before_anybody_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let then = Timestamp(1_772_366_400_000);
        let authority = CertificateAuthority::create(&"weft.local".parse().unwrap(), then).unwrap();
        let subject = "spiffe://weft.local/operator/admin/admin".parse::<SpiffeId>().unwrap().subject;
        let credential = authority.issue_credential(&subject, then, Duration::from_secs(60)).unwrap();
        credential.save(&dir.path().join("admin")).unwrap();
        let file = dir.path().join(CONTEXT_FILE);
        fs::write(&file, r#"{ "controllers": ["127.0.0.1:1"], "credential_dir": "admin" }"#).unwrap();

        let context = ContextArgs { context: Some(file) }.load().unwrap();
        let refused = context.client().unwrap_err().to_string();
        assert!(refused.contains("expired") && refused.contains("at 2026-03-01T12:01:00Z"), "{refused}");
        assert!(refused.contains("`weft-controller operator issue`"), "{refused}");
        context.check_lifetime(&credential, credential.expires_at().0).unwrap();
    }
}
