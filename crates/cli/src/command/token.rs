//! `weft token`: join tokens, with which a sidecar gets its first certificate.

use crate::command::change::duration;
use crate::context::ContextArgs;
use crate::failure::{Exit, Failure, Outcome};
use crate::output::print_line;
use crate::output::time::point;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use weft_client::{command, retry};
use weft_model::{Name, ServiceName};
use weft_proto::v1;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make a token that works once; it is shown now and never again
    Create(Create),
}

#[derive(Debug, clap::Args)]
struct Create {
    /// The service whose instance the holder becomes
    #[arg(long, value_name = "NAME", value_parser = ServiceName::parse_lenient)]
    service: ServiceName,
    /// The only instance that it may become [default: any]
    #[arg(long, value_name = "NAME")]
    instance: Option<Name>,
    /// How long it works
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = duration)]
    ttl: Duration,
    /// Write the token into a new file that only we can read, instead of to standard output
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Why; recorded in the log
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
}

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    let Command::Create(create) = args.command;
    let client = context.load()?.client()?;
    let request = v1::CreateJoinTokenRequest {
        meta: Some(command(create.reason)),
        service: create.service.to_string(),
        instance: create.instance.map(|name| name.to_string()).unwrap_or_default(),
        ttl_seconds: u32::try_from(create.ttl.as_secs()).unwrap_or(u32::MAX),
    };
    let response = retry(|| {
        let (mut client, request) = (client.clone(), request.clone());
        async move { client.create_join_token(request).await }
    })
    .await?;
    match &create.out {
        None => print_line(&response.token)?,
        Some(file) => write_new(file, &response.token)?,
    }
    let target = create.out.as_deref().unwrap_or(Path::new("TOKEN_FILE"));
    eprintln!(
        "a token for {} that works once, until {}; start the sidecar with `weft-proxy --join-token-file {} …`",
        create.service,
        point(response.expires_at_ms),
        target.display()
    );
    Ok(Exit::Ok)
}

/// A secret goes into a file that nobody else can have open.
fn write_new(file: &Path, token: &str) -> Outcome<()> {
    let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
    created.and_then(|mut file| writeln!(file, "{token}")).map_err(|error| {
        let failure = Failure::fault(format!("the token cannot be written to {}: {error}", file.display()));
        match error.kind() {
            ErrorKind::AlreadyExists => {
                failure.next("name a file that does not exist; the token that was made expires unused")
            }
            _ => failure,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_token_file_is_new_and_ours_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        write_new(&file, "weft1.x").unwrap();
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "weft1.x\n");
        assert!(write_new(&file, "weft1.y").unwrap_err().to_string().contains("next: name a file"));
    }
}
