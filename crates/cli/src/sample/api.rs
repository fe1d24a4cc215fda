//! The sample `api` service. It keeps one connection to the database, which is what makes it worth meshing: the server
//! speaks its part of the protocol over a connection that stays for hours.

use crate::failure::{Exit, Failure, Outcome, chain};
use crate::sample::{ANSWER_TIMEOUT, Common, answer, serve};
use axum::Router;
use axum::routing::get;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::{Client, Config, NoTls};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    common: Common,
    /// A file with the database's URL
    #[arg(long, value_name = "FILE")]
    database_url_file: PathBuf,
}

pub(super) async fn run(args: Args) -> Outcome<Exit> {
    let unusable = |why: String| {
        let file = args.database_url_file.display();
        Failure::fault(format!("the database URL in {file} cannot be used: {why}"))
            .next("write a PostgreSQL URL into it")
    };
    let text =
        std::fs::read_to_string(&args.database_url_file).map_err(|error| unusable(error.to_string()))?;
    let mut config: Config =
        text.trim().parse().map_err(|_| unusable("it is not a PostgreSQL URL".to_owned()))?;
    config.application_name(&args.common.name).connect_timeout(ANSWER_TIMEOUT);

    let database = Arc::new(Database { config, session: Mutex::new(None) });
    let name = Arc::<str>::from(args.common.name.as_str());
    let handler = move || {
        let (name, database) = (Arc::clone(&name), Arc::clone(&database));
        async move {
            let asked = timeout(ANSWER_TIMEOUT, database.ask()).await;
            let asked = asked.unwrap_or_else(|_| Err("db does not answer in time".to_owned()));
            answer(asked.map(|db| json!({ "service": "api", "instance": &*name, "db": db })), &name)
        }
    };
    serve(&args.common, Router::new().route("/", get(handler))).await
}

struct Database {
    config: Config,
    /// The one connection; one request at a time is plenty for a sample.
    session: Mutex<Option<Session>>,
}

struct Session {
    client: Client,
    _driver: JoinSet<()>,
}

impl Database {
    /// Asks over the connection that is there, else over a new one. A connection that broke meanwhile is replaced once.
    async fn ask(&self) -> Result<Value, String> {
        let mut session = self.session.lock().await;
        if let Some(open) = session.as_ref()
            && let Ok(value) = query(&open.client).await
        {
            return Ok(value);
        }
        let open = connect(&self.config).await.map_err(|error| format!("db: {}", chain(&error)))?;
        let value = query(&open.client).await.map_err(|error| format!("db: {}", chain(&error)));
        *session = Some(open);
        value
    }
}

async fn connect(config: &Config) -> Result<Session, tokio_postgres::Error> {
    let (client, connection) = config.connect(NoTls).await?;
    let mut driver = JoinSet::new();
    driver.spawn(async move {
        // Its errors reach the queries as well.
        let _ = connection.await;
    });
    Ok(Session { client, _driver: driver })
}

async fn query(client: &Client) -> Result<Value, tokio_postgres::Error> {
    let sql =
        "select count(*), pg_backend_pid(), to_char(now() at time zone 'utc', 'HH24:MI:SS') from orders";
    let row = client.query_one(sql, &[]).await?;
    let (orders, backend, time): (i64, i32, String) = (row.get(0), row.get(1), row.get(2));
    Ok(json!({ "orders": orders, "backend": backend, "time": time }))
}
