//! `DiffPolicy` and `Suggest`: what the history says of a policy that is not in force.

use std::sync::Arc;

use vnet_proto::model::{Mode, VmSelector};
use vnet_proto::v1;

use super::selector;
use crate::convert;
use crate::hub::{Hub, Span};
use crate::policy::{ListCache, Policy};
use crate::refusal::Refusal;
use crate::replay::{Change, Recorded, Report, Trial};
use crate::suggest::{self, SuggestError};

/// Changes in one answer.
const CHANGES_MAX: usize = 10_000;

/// Replays the history against a document.
pub(super) async fn diff(
    hub: &Hub,
    request: &v1::DiffPolicyRequest,
) -> Result<v1::DiffPolicyResponse, Refusal> {
    let vms = selector(request.vms.clone())?;
    let mode: Option<Mode> = v1::Mode::try_from(request.mode)
        .map_err(|_| Refusal::field("mode", format!("{} is not a mode", request.mode)))?
        .try_into()
        .map_err(Refusal::from)?;
    let source = match request.source.as_str() {
        "" => "document",
        source => source,
    };
    let lists = crate::lists::unpack(&request.lists)?;
    let policy = Policy::parse_with(source, &request.document, &lists, &ListCache::default())
        .map_err(Refusal::Document)?;
    drop(lists);
    policy.run_tests(source, hub.now()).map_err(Refusal::Document)?;
    let mut trial = Trial::new(&policy, source, mode, hub.now());
    let mut report = Report::default();
    hub.recall(vms.as_ref(), span(request.time), |recalled| match recalled {
        Ok(recorded) => report.replay(&mut trial, &recorded),
        Err((why, count)) => report.leave_out(why, count),
    })
    .await?;
    let (changes, changes_left_off) = changes(&report);
    Ok(v1::DiffPolicyResponse {
        changes,
        changes_left_off,
        replay: Some(replayed(&report)),
    })
}

/// Proposes a policy.
pub(super) async fn suggest(
    hub: &Arc<Hub>,
    request: v1::SuggestRequest,
) -> Result<v1::SuggestResponse, Refusal> {
    let vms = selector(request.vms)?;
    let span = span(request.time);
    let now = hub.now();
    if request.from_grants {
        let answers = hub.answered(vms.as_ref(), span).await?;
        let grants = answers.len() as u64;
        return Ok(v1::SuggestResponse {
            document: aside(move || suggest::from_answers(&answers, now)).await?,
            grants,
            ..Default::default()
        });
    }
    let (history, left_out) = recalled(hub, vms.as_ref(), span).await?;
    let suggestion = aside(move || suggest::from_history(&history, now)).await?;
    let mut report = suggestion.report;
    for (why, count) in left_out {
        report.leave_out(why, count);
    }
    Ok(v1::SuggestResponse {
        document: suggestion.document,
        changes: changes(&report).0,
        replay: Some(replayed(&report)),
        grants: 0,
    })
}

/// Makes a suggestion where nobody else's call waits for it: histories are replayed several times over, and a file
/// of many answers is put to each of its own tests.
async fn aside<T: Send + 'static>(
    make: impl FnOnce() -> Result<T, SuggestError> + Send + 'static,
) -> Result<T, Refusal> {
    let made = tokio::task::spawn_blocking(make).await;
    Ok(made.map_err(|_| Refusal::Unavailable("the suggestion was given up".to_owned()))??)
}

type LeftOut = Vec<(crate::replay::LeftOut, u64)>;

async fn recalled(
    hub: &Hub,
    vms: Option<&VmSelector>,
    span: Span,
) -> Result<(Vec<Recorded>, LeftOut), Refusal> {
    let (mut history, mut left_out) = (Vec::new(), Vec::new());
    hub.recall(vms, span, |recalled| match recalled {
        Ok(recorded) => history.push(recorded),
        Err(why) => left_out.push(why),
    })
    .await?;
    Ok((history, left_out))
}

fn span(time: Option<v1::TimeRange>) -> Span {
    let time = time.unwrap_or_default();
    Span {
        start: convert::time(time.start),
        end: convert::time(time.end),
    }
}

fn changes(report: &Report) -> (Vec<v1::VerdictChange>, u64) {
    let all = report.changes();
    let left_off = all.len().saturating_sub(CHANGES_MAX);
    let told = all.into_iter().take(CHANGES_MAX).map(change).collect();
    (told, left_off as u64)
}

fn change(change: &Change) -> v1::VerdictChange {
    v1::VerdictChange {
        vm: change.vm.clone(),
        target: Some((&change.target).into()),
        names: change.names.clone(),
        before: convert::action(change.before.0).into(),
        before_reason: Some((&change.before.1).into()),
        after: convert::action(change.after.0).into(),
        after_reason: Some((&change.after.1).into()),
        count: change.count,
        last_at: convert::timestamp(change.last_at),
    }
}

fn replayed(report: &Report) -> v1::Replay {
    v1::Replay {
        flows: report.flows,
        lookups: report.lookups,
        questions: report.questions,
        left_out: report
            .left_out
            .iter()
            .map(|(why, count)| v1::LeftOut {
                text: why.to_string(),
                count: *count,
            })
            .collect(),
        first_at: report.first_at.and_then(convert::timestamp),
        last_at: report.last_at.and_then(convert::timestamp),
    }
}

impl From<SuggestError> for Refusal {
    fn from(error: SuggestError) -> Self {
        let text = error.to_string();
        match error {
            SuggestError::Nothing(_) => Self::Precondition {
                reason: "NOTHING_RECORDED",
                text,
            },
            SuggestError::TooMany { .. } | SuggestError::TooManyAnswers { .. } => Self::Limit(text),
            SuggestError::Refused(_) => Self::Unavailable(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Outcome;
    use crate::replay::tests::History;

    #[tokio::test(flavor = "current_thread")]
    async fn a_suggestion_is_made_beside_the_thread_that_serves_calls() {
        let serving = std::thread::current().id();
        let made = aside(move || Ok(std::thread::current().id() != serving)).await;
        assert!(made.unwrap());
        let failed = aside(|| Err::<(), _>(SuggestError::TooMany { found: 9 })).await;
        assert!(matches!(failed, Err(Refusal::Limit(_))), "{failed:?}");
    }

    #[test]
    fn more_changes_than_one_answer_has_are_counted() {
        let mut history = History::default();
        for n in 0..=CHANGES_MAX {
            let address = std::net::Ipv4Addr::from(0x0102_0000 + u32::try_from(n).unwrap());
            history.add(
                "web",
                &format!("tcp {address}:443"),
                &[],
                Outcome::Allow,
                "rule:r",
            );
        }
        let report = history.replay("version: 1\n");
        let (told, left_off) = changes(&report);
        assert_eq!((told.len(), left_off), (CHANGES_MAX, 1));
    }
}
