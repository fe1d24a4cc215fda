//! `weft why`: whether a connection would pass, and every step of the answer.

use crate::command::answer;
use crate::context::ContextArgs;
use crate::failure::{Exit, Outcome};
use crate::moment::AtArgs;
use crate::output::text::{printable, printable_lines};
use crate::output::{Format, OutputArgs, json, print, yaml};
use serde::Serialize;
use std::str::FromStr;
use weft_model::{Port, ServiceName};
use weft_proto::v1;

#[derive(Debug, clap::Args)]
#[command(after_help = "Exits with 0 if the connection would pass, with 2 if it would be refused.")]
pub(crate) struct Args {
    /// The service that connects, such as web or default/web
    #[arg(value_name = "SRC", value_parser = ServiceName::parse_lenient)]
    source: ServiceName,
    /// What it connects to, such as db:5432
    #[arg(value_name = "DST:PORT")]
    target: Target,
    #[command(flatten)]
    at: AtArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// A service and one of its ports.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    service: ServiceName,
    port: Port,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (service, port) = text.rsplit_once(':').ok_or("write SERVICE:PORT, for example db:5432")?;
        let service = ServiceName::parse_lenient(service).map_err(|error| error.to_string())?;
        Ok(Self { service, port: port.parse().map_err(|error: weft_model::IdError| error.to_string())? })
    }
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Answer {
    as_of: String,
    source: String,
    destination: String,
    permitted: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    summary: String,
    steps: Vec<Step>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Step {
    question: String,
    answer: String,
    passed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<Evidence>,
}

/// The event that an answer rests on.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Evidence {
    scope: String,
    version: u64,
    position: u64,
}

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    let request = v1::WhyRequest {
        source: args.source.to_string(),
        destination: args.target.service.to_string(),
        port: args.target.port.number().into(),
        at: args.at.wire(),
    };
    let destination = format!("{}:{}", args.target.service, args.target.port);
    let response = context.load()?.client()?.why(request).await;
    let response = answer(response);
    let response =
        response.map_err(|failure| failure.or_next("see the services with `weft get services`"))?;
    args.at.check(response.as_of)?;
    let answer = Answer::of(args.source.to_string(), destination, response);
    print(&match args.output.format {
        Format::Table => text(&answer),
        Format::Json => json(&answer)?,
        Format::Yaml => yaml(&answer)?,
    })?;
    Ok(if answer.permitted { Exit::Ok } else { Exit::CheckFailed })
}

impl Answer {
    fn of(source: String, destination: String, response: v1::WhyResponse) -> Self {
        let step = |step: v1::WhyStep| Step {
            event: (step.position != 0).then_some(Evidence {
                scope: step.scope,
                version: step.version,
                position: step.position,
            }),
            question: step.question,
            answer: step.answer,
            passed: step.passed,
        };
        let as_of = response.as_of.unwrap_or_default();
        Self {
            as_of: format!("{}.{}", as_of.epoch, as_of.position),
            source,
            destination,
            permitted: response.permitted,
            reason: response.reason,
            summary: response.summary,
            steps: response.steps.into_iter().map(step).collect(),
        }
    }
}

fn text(answer: &Answer) -> String {
    let verdict =
        if answer.permitted { "PERMITTED".to_owned() } else { format!("REFUSED ({})", answer.reason) };
    let mut text = format!("{verdict}  {} → {} as of {}\n", answer.source, answer.destination, answer.as_of);
    text.push_str(&format!("{}\n\n", answer.summary));
    for (index, step) in answer.steps.iter().enumerate() {
        let mark = if step.passed { "ok  " } else { "STOP" };
        text.push_str(&format!(
            "{:>2}. {mark} {}\n         {}\n",
            index + 1,
            step.question,
            printable(&step.answer)
        ));
        if let Some(Evidence { scope, version, position }) = &step.event {
            let version = if *version == 0 { String::new() } else { format!(" version {version}") };
            text.push_str(&format!("         {scope}{version}: `weft log {position}`\n"));
        }
    }
    printable_lines(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_name_a_service_and_a_port() {
        let target: Target = "db:5432".parse().unwrap();
        assert_eq!((target.service.to_string().as_str(), target.port.number()), ("default/db", 5432));
        for bad in ["db", "db:0", "db:x", ":1", "a/b/c:1"] {
            assert!(bad.parse::<Target>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_answer_reads_from_the_verdict_to_the_event() {
        let response = v1::WhyResponse {
            as_of: Some(v1::ConfigVersion { epoch: 1, position: 42 }),
            permitted: false,
            reason: "policy_denied".into(),
            summary: "default/db refuses default/web: no rule allows it.".into(),
            steps: vec![
                v1::WhyStep {
                    question: "Does default/db exist?".into(),
                    answer: "yes".into(),
                    passed: true,
                    scope: "service/default/db".into(),
                    version: 1,
                    position: 3,
                },
                v1::WhyStep {
                    question: "May default/web connect?".into(),
                    answer: "no".into(),
                    ..v1::WhyStep::default()
                },
            ],
        };
        let answer = Answer::of("default/web".into(), "default/db:5432".into(), response);
        let expected = "REFUSED (policy_denied)  default/web → default/db:5432 as of 1.42\n\
            default/db refuses default/web: no rule allows it.\n\
            \n\
            \x201. ok   Does default/db exist?\n\
            \x20        yes\n\
            \x20        service/default/db version 1: `weft log 3`\n\
            \x202. STOP May default/web connect?\n\
            \x20        no\n";
        assert_eq!(text(&answer), expected);
    }
}
