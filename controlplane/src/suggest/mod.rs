//! Suggestions: a policy file made of what was recorded, or of what people answered.
//!
//! The file allows what was let through, by names where the bindings are known, and nothing else that its
//! maker can help: names below one registrable domain become one pattern, and that is the only widening. Every
//! suggestion is loaded, its tests are run, and the same history is replayed against it; of several ways to
//! write it the first is taken under which nothing is decided otherwise. Where the history contradicts itself
//! the last decision counts, and what that changes is told.
//!
//! Pure: history comes as a slice, and time as an argument.

mod answers;
mod facts;
mod plan;
mod render;
#[cfg(test)]
mod tests;

use vnet_proto::model::VmSelector;

pub use answers::from_answers;

use crate::clock::Now;
use crate::policy::{Policy, PolicyErrors};
use crate::replay::{Recorded, Report, Trial};
use facts::Facts;
use plan::{Plan, Way};

/// Different destinations that a suggestion may be made of. A file of more is not one that anybody reads.
pub const DESTINATIONS_MAX: usize = 5_000;

/// What a suggestion goes by in reasons.
const SOURCE: &str = "suggestion";

/// A policy file, and how it compares.
#[derive(Debug)]
pub struct Suggestion {
    /// The document.
    pub document: String,
    /// What the history looks like under it.
    pub report: Report,
}

/// Why there is no suggestion.
#[derive(Debug, thiserror::Error)]
pub enum SuggestError {
    /// There is nothing to make one of.
    #[error("{0}")]
    Nothing(&'static str),
    /// There is too much.
    #[error(
        "the history has {found} different destinations, more than a suggestion is made of ({DESTINATIONS_MAX}); \
         narrow it with --vm or --since"
    )]
    TooMany {
        /// How many.
        found: usize,
    },
    /// People gave more answers than a document has room for.
    #[error(
        "people gave {found} different answers about {about}, more than a policy may have rules for them ({most}); \
         narrow it with --vm or --since"
    )]
    TooManyAnswers {
        /// Connections and lookups, or forwards.
        about: &'static str,
        /// How many.
        found: usize,
        /// The most.
        most: usize,
    },
    /// What was made does not load, or fails its own tests.
    #[error("the suggestion does not load, which is an error of vnet's: {0}")]
    Refused(PolicyErrors),
}

/// A policy that decides a history as it was decided.
///
/// # Errors
/// [`SuggestError`].
pub fn from_history(history: &[Recorded], now: Now) -> Result<Suggestion, SuggestError> {
    let facts = Facts::gather(history);
    if facts.is_empty() {
        return Err(SuggestError::Nothing(
            "nothing is recorded of these VMs in this time; let them do what they are to be allowed under: vnetctl \
             run --mode observe",
        ));
    }
    if facts.len() > DESTINATIONS_MAX {
        return Err(SuggestError::TooMany { found: facts.len() });
    }
    let mut best: Option<Suggestion> = None;
    for way in Way::ALL {
        let plan = Plan::make(&facts, way);
        let header = render::header(history);
        let document = finished(&plan, &header, now)?;
        let policy = load(&document)?;
        let mut trial = Trial::new(&policy, SOURCE, None, now);
        let mut report = Report::default();
        for recorded in history {
            report.replay(&mut trial, recorded);
        }
        let changed = report.changed();
        if best.as_ref().is_none_or(|best| changed < best.report.changed()) {
            best = Some(Suggestion { document, report });
        }
        if changed == 0 {
            break;
        }
    }
    best.ok_or(SuggestError::Nothing("nothing is recorded"))
}

/// A plan as a document, with those of its tests that it passes. Some cannot be asked of a document alone: what
/// the test network guards is not what the guest's did.
fn finished(plan: &Plan, header: &str, now: Now) -> Result<String, SuggestError> {
    let without = load(&render::document(plan, header, &[]))?;
    let probes: Vec<&plan::Probe> = plan
        .probes
        .iter()
        .filter(|probe| passes(&without, probe, now))
        .collect();
    let document = render::document(plan, header, &probes);
    load(&document)?
        .run_tests(SOURCE, now)
        .map_err(SuggestError::Refused)?;
    Ok(document)
}

/// Whether a document decides a destination as it is expected to.
fn passes(policy: &Policy, probe: &plan::Probe, now: Now) -> bool {
    let vm = probe.vm.as_ref().map(|name| VmSelector::named(name.clone()));
    let destination = probe.text.parse();
    destination.is_ok_and(|destination| policy.answers(vm.as_ref(), &destination, now) == probe.expected)
}

fn load(document: &str) -> Result<Policy, SuggestError> {
    Policy::parse(SOURCE, document).map_err(SuggestError::Refused)
}
