//! `weft sql`: a question to the status views, read-only and bounded.

use crate::context::ContextArgs;
use crate::failure::{Exit, Failure, Outcome, chain};
use crate::output::{Format, OutputArgs, json, print, table, yaml};
use futures_util::TryStreamExt;
use serde_json::{Map, Value};
use std::pin::pin;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use super::change::duration;

/// Longest that a statement may be given; the server's own limit is not far above.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  weft sql 'select * from status.sidecars'
  weft sql 'select position, type, actor from audit.events order by position desc limit 5' -o json")]
pub(crate) struct Args {
    /// One statement
    query: String,
    /// Most rows to show
    #[arg(long, value_name = "COUNT", default_value_t = 1_000)]
    rows: usize,
    /// Longest that the database may take, 1ms to 24h
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = statement_timeout)]
    timeout: Duration,
    #[command(flatten)]
    output: OutputArgs,
}

/// The server counts whole milliseconds, and takes none for no limit.
fn statement_timeout(text: &str) -> Result<Duration, String> {
    let timeout = duration(text)?;
    let bounds = Duration::from_millis(1)..=TIMEOUT_MAX;
    if bounds.contains(&timeout) { Ok(timeout) } else { Err("must be from 1ms to 24h".to_owned()) }
}

/// A column's name and type.
type Column = (String, Type);

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    let mut config = context.load()?.reader()?;
    let options =
        format!("-c default_transaction_read_only=on -c statement_timeout={}", args.timeout.as_millis());
    config.options(options).application_name("weft sql").connect_timeout(args.timeout);
    let (client, connection) = config.connect(NoTls).await.map_err(|error| {
        Failure::fault(format!("the database does not let us in: {}", chain(&error)))
            .next("is the mesh up? see `weft status`, or start it with `weft up`")
    })?;
    let mut driver = JoinSet::new();
    driver.spawn(async move {
        // Its errors reach the query as well.
        let _ = connection.await;
    });
    let (columns, rows, more) = ask(&client, &args.query, args.rows).await?;
    print(&match args.output.format {
        Format::Table => {
            let headings: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
            let cells: Vec<Vec<String>> = rows
                .iter()
                .map(|row| row.iter().map(|cell| cell.clone().unwrap_or_default()).collect())
                .collect();
            table::render(&headings, &cells)
        }
        Format::Json => json(&objects(&columns, &rows))?,
        Format::Yaml => yaml(&objects(&columns, &rows))?,
    })?;
    if more {
        eprintln!(
            "only the first {} rows are shown; ask for more with --rows, or for less with LIMIT",
            args.rows
        );
    }
    Ok(Exit::Ok)
}

/// What `weft sql` takes.
const ONE_QUESTION: &str =
    "give one statement that answers with rows, such as a SELECT, in quotes; `weft apply` changes the mesh";

type Rows = Vec<Vec<Option<String>>>;

async fn ask(client: &Client, query: &str, rows_max: usize) -> Outcome<(Vec<Column>, Rows, bool)> {
    let refused = |error| refused(&error);
    // Preparing refuses more than one statement, and tells the types, which the text of the rows does not.
    let prepared = client.prepare(query).await.map_err(refused)?;
    let columns: Vec<Column> =
        prepared.columns().iter().map(|column| (column.name().to_owned(), column.type_().clone())).collect();
    if columns.is_empty() {
        // Such as SET, BEGIN or COPY: it would change the connection, which ends here, or speak another protocol.
        return Err(Failure::fault("this statement has no columns to show").next(ONE_QUESTION));
    }
    let mut messages = pin!(client.simple_query_raw(query).await.map_err(refused)?);
    let mut rows = Vec::new();
    while let Some(message) = messages.try_next().await.map_err(refused)? {
        let SimpleQueryMessage::Row(row) = message else { continue };
        if rows.len() == rows_max {
            return Ok((columns, rows, true));
        }
        rows.push((0..row.len()).map(|index| row.get(index).map(str::to_owned)).collect());
    }
    Ok((columns, rows, false))
}

fn refused(error: &tokio_postgres::Error) -> Failure {
    let Some(db) = error.as_db_error() else {
        return Failure::fault(format!("the query failed: {}", chain(error)));
    };
    let mut what = format!("the database refuses the query: {}", db.message());
    for more in [db.detail(), db.hint()].into_iter().flatten() {
        what.push_str("; ");
        what.push_str(more);
    }
    let failure = Failure::fault(what);
    match db.code().code() {
        // insufficient_privilege, read_only_sql_transaction, object_not_in_prerequisite_state (a view)
        "42501" | "25006" | "55000" => failure.next("`weft sql` reads the schemas status and audit; change the mesh with `weft apply`"),
        // undefined_table
        "42P01" => failure.next(
            "list the views with `weft sql \"select schemaname, viewname from pg_views where schemaname in ('status', 'audit')\"`",
        ),
        // syntax_error
        "42601" => failure.next(ONE_QUESTION),
        // query_canceled
        "57014" => failure.next("give it longer with --timeout"),
        _ => failure,
    }
}

fn objects(columns: &[Column], rows: &Rows) -> Vec<Map<String, Value>> {
    let keys = keys(columns);
    let object = |row: &Vec<Option<String>>| {
        let cells = keys.iter().zip(columns).zip(row);
        cells.map(|((key, (_, kind)), cell)| (key.clone(), value(kind, cell.as_deref()))).collect()
    };
    rows.iter().map(object).collect()
}

/// The columns' names, made different: the second `n` is `n_2`.
fn keys(columns: &[Column]) -> Vec<String> {
    let mut keys: Vec<String> = Vec::with_capacity(columns.len());
    for (name, _) in columns {
        // Numbered past a column that is called so itself, wherever it stands.
        let mut numbered = (2_u32..).map(|number| format!("{name}_{number}"));
        let taken = |key: &String| keys.contains(key) || columns.iter().any(|(other, _)| other == key);
        let key = if keys.contains(name) { numbered.find(|key| !taken(key)) } else { None };
        keys.push(key.unwrap_or_else(|| name.clone()));
    }
    keys
}

/// A cell as JSON: numbers, truth values and JSON as such, everything else as PostgreSQL writes it.
fn value(kind: &Type, cell: Option<&str>) -> Value {
    let Some(text) = cell else { return Value::Null };
    let parsed = match *kind {
        Type::BOOL => Some(Value::Bool(text == "t")),
        Type::INT2
        | Type::INT4
        | Type::INT8
        | Type::OID
        | Type::FLOAT4
        | Type::FLOAT8
        | Type::JSON
        | Type::JSONB => serde_json::from_str(text).ok(),
        _ => None,
    };
    parsed.unwrap_or_else(|| Value::String(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn cells_keep_their_type_in_json() {
        assert_eq!(value(&Type::INT8, Some("42")), json!(42));
        assert_eq!(value(&Type::BOOL, Some("f")), json!(false));
        assert_eq!(value(&Type::JSON, Some("{\"a\":1}")), json!({"a": 1}));
        assert_eq!(value(&Type::TEXT, Some("42")), json!("42"));
        assert_eq!(value(&Type::FLOAT8, Some("NaN")), json!("NaN"));
        assert_eq!(value(&Type::INT8, None), Value::Null);
    }

    #[test]
    fn columns_of_one_name_are_all_kept() {
        let columns = ["n", "n", "n_2", "m", "n"].map(|name| (name.to_owned(), Type::INT4));
        assert_eq!(keys(&columns), ["n", "n_3", "n_2", "m", "n_4"]);
        let rows = vec![["1", "2", "3", "4", "5"].map(|cell| Some(cell.to_owned())).to_vec()];
        assert_eq!(objects(&columns, &rows)[0]["n_4"], json!(5));
    }

    #[test]
    fn a_time_limit_is_one() {
        assert_eq!(statement_timeout("1ms"), Ok(Duration::from_millis(1)));
        for none in ["0s", "999us", "25h", "soon"] {
            assert!(statement_timeout(none).is_err(), "{none}");
        }
    }

    #[tokio::test]
    async fn answers_are_bounded_and_one_statement_is_all() {
        let database = weft_testkit::TestDatabase::create().await;
        let client = database.connect().await;
        let query = "select n, n::text as t, null as nothing from generate_series(1, 10) n";
        let (columns, rows, more) = ask(&client, query, 3).await.unwrap();
        assert!(more);
        let first = serde_json::to_value(objects(&columns, &rows)).unwrap();
        assert_eq!(first[0], json!({ "n": 1, "t": "1", "nothing": null }));
        assert_eq!(rows.len(), 3);

        let (_, rows, more) = ask(&client, query, 10).await.unwrap();
        assert_eq!((rows.len(), more), (10, false));

        let two = ask(&client, "select 1; drop schema public", 1).await.unwrap_err();
        assert!(two.to_string().contains("give one statement"), "{two}");
        for mute in ["set statement_timeout = 0", "begin", "copy (select 1) to stdout", "", "select"] {
            let refused = ask(&client, mute, 1).await.unwrap_err().to_string();
            assert!(refused.contains("no columns to show"), "{mute}: {refused}");
        }
        let absent = ask(&client, "select * from status.nothing", 1).await.unwrap_err();
        assert!(absent.to_string().contains("pg_views"), "{absent}");
        database.close().await;
    }
}
