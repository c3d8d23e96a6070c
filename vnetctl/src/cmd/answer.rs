//! `approve`, `deny` and `allow`: a person's answers.
//!
//! By id, an answer holds until the VM stops, in the narrowest scope, for the VM that asked. What is
//! asked under an id never changes, and the beginning of one never stands for a request that came
//! later (`controlplane/src/approval`), so an id answers what was shown under it and nothing else. Of a
//! destination, an answer holds for ever, for the only VM there is or those that were named.

use clap::Args;
use tonic_types::StatusExt as _;
use vnet_proto::model::{NamePattern, Target};
use vnet_proto::v1;

use super::Context;
use super::grants::sentence;
use super::matching::Matching;
use super::select::{BudgetArgs, LifetimeArgs, VmArgs};
use crate::client::unary;
use crate::failure::{Failure, describe};
use crate::output::{self, Output, words};

/// How wide an answer reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ScopeArg {
    /// The address and port
    HostPort,
    /// The address, any port
    Host,
    /// The name and port
    NamePort,
    /// The name, any port
    Name,
    /// Every name below the name's registrable domain
    Subdomains,
}

impl From<ScopeArg> for v1::Scope {
    fn from(scope: ScopeArg) -> Self {
        match scope {
            ScopeArg::HostPort => Self::HostPort,
            ScopeArg::Host => Self::Host,
            ScopeArg::NamePort => Self::NamePort,
            ScopeArg::Name => Self::Name,
            ScopeArg::Subdomains => Self::Subdomains,
        }
    }
}

/// Options of an answer to a pending request.
#[derive(Debug, Clone, Args)]
pub struct AnswerArgs {
    /// How wide the answer reaches; the narrowest if left out
    #[arg(long, value_name = "SCOPE")]
    pub scope: Option<ScopeArg>,
    /// For how long.
    #[command(flatten)]
    pub lifetime: LifetimeArgs,
    /// For which VMs.
    #[command(flatten)]
    pub vms: VmArgs,
    /// Why, for the record
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// The etag of what was shown; the answer is refused if it is not that of the request. The id
    /// alone says as much
    #[arg(long, value_name = "ETAG")]
    pub etag: Option<String>,
}

/// Arguments of `approve`.
#[derive(Debug, Args)]
pub struct ApproveArgs {
    /// Ids of pending requests, or their beginnings of at least four characters
    #[arg(value_name = "ID", required_unless_present = "matching")]
    pub ids: Vec<String>,
    /// Answer every request for a name that fits, as `*.example.com`, of the VMs that are named
    #[arg(long, value_name = "NAME", conflicts_with_all = ["ids", "etag"])]
    pub matching: Option<NamePattern>,
    /// The answer.
    #[command(flatten)]
    pub answer: AnswerArgs,
    /// How much.
    #[command(flatten)]
    pub budget: BudgetArgs,
    /// For a name: allow only the lookup, not connections to its addresses
    #[arg(long)]
    pub lookup_only: bool,
}

/// Arguments of `deny`.
#[derive(Debug, Args)]
pub struct DenyArgs {
    /// Ids of pending requests (or beginnings of at least four characters), or a destination as
    /// `tcp 192.0.2.7:443`
    #[arg(value_name = "ID|DESTINATION", required_unless_present = "matching")]
    pub words: Vec<String>,
    /// Answer every request for a name that fits, as `*.example.com`, of the VMs that are named
    #[arg(long, value_name = "NAME", conflicts_with_all = ["words", "etag"])]
    pub matching: Option<NamePattern>,
    /// The answer.
    #[command(flatten)]
    pub answer: AnswerArgs,
}

/// Arguments of `allow`.
#[derive(Debug, Args)]
pub struct AllowArgs {
    /// `tcp|udp|icmp|icmpv6|any ADDRESS[/LENGTH][:PORTS]`, `domain NAME[:PORTS]` or `lookup NAME`
    #[arg(value_name = "DESTINATION", required = true)]
    pub words: Vec<String>,
    /// For how long.
    #[command(flatten)]
    pub lifetime: LifetimeArgs,
    /// How much.
    #[command(flatten)]
    pub budget: BudgetArgs,
    /// For which VMs.
    #[command(flatten)]
    pub vms: VmArgs,
    /// Why, for the record
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

impl ApproveArgs {
    /// Runs it.
    ///
    /// # Errors
    /// What the controlplane refuses.
    pub async fn execute(self, context: &mut Context) -> Result<(), Failure> {
        self.answer.check(self.ids.len())?;
        let lifetime = self.answer.lifetime.message()?;
        let client = context.connection.open().await?;
        let request = v1::ApproveRequest {
            etag: self.answer.etag(),
            scope: self.answer.scope(),
            lifetime,
            vms: self.answer.vms.message(),
            budget: self.budget.message(),
            reason: self.answer.reason.clone().unwrap_or_default(),
            lookup_only: self.lookup_only,
            ..Default::default()
        };
        let approve = async |request: v1::ApproveRequest, output: &mut Output| {
            let answer = client.pending().approve(unary(request)).await?.into_inner();
            output.done("vnet.v1.ApproveResponse", &answer, || {
                answered("approved", answer.request.as_ref(), answer.grant.as_ref())
            })
        };
        if let Some(pattern) = self.matching {
            // Behind a name may be any address; what is guarded is opened by itself alone.
            let found =
                Matching::find(&client, pattern, request.vms.clone(), |r| r.guards.is_empty()).await?;
            let each = async |id, etag| {
                let request = v1::ApproveRequest {
                    id,
                    etag,
                    // For the VM that asks.
                    vms: None,
                    ..request.clone()
                };
                approve(request, &mut context.output).await
            };
            let summary = found.answer(&client, "approved", each).await?;
            return context.output.sum_up(&summary);
        }
        super::each(self.ids, async |id| {
            let request = v1::ApproveRequest {
                id,
                ..request.clone()
            };
            approve(request, &mut context.output).await
        })
        .await
    }
}

impl DenyArgs {
    /// Runs it.
    ///
    /// # Errors
    /// What makes no sense, and what the controlplane refuses.
    pub async fn execute(self, context: &mut Context) -> Result<(), Failure> {
        if is_destination(&self.words) {
            if self.answer.scope.is_some() || self.answer.etag.is_some() {
                return Err(Failure::Usage(
                    "--scope and --etag are for pending requests; a destination is as wide as it is written"
                        .to_owned(),
                ));
            }
            let AnswerArgs {
                lifetime,
                vms,
                reason,
                ..
            } = self.answer;
            let request = v1::CreateGrantRequest {
                action: v1::Action::Deny.into(),
                vms: vms.message(),
                lifetime: lifetime.message()?,
                reason: reason.unwrap_or_default(),
                ..Default::default()
            };
            return grant(&self.words, request, context).await;
        }
        self.answer.check(self.words.len())?;
        let lifetime = self.answer.lifetime.message()?;
        let client = context.connection.open().await?;
        let request = v1::DenyRequest {
            etag: self.answer.etag(),
            scope: self.answer.scope(),
            lifetime,
            vms: self.answer.vms.message(),
            reason: self.answer.reason.clone().unwrap_or_default(),
            ..Default::default()
        };
        let deny = async |request: v1::DenyRequest, output: &mut Output| {
            let answer = client.pending().deny(unary(request)).await?.into_inner();
            output.done("vnet.v1.DenyResponse", &answer, || {
                let said = answered("denied", answer.request.as_ref(), answer.grant.as_ref());
                format!("{said}{}", words::cut(answer.cut.as_ref()))
            })
        };
        if let Some(pattern) = self.matching {
            let found = Matching::find(&client, pattern, request.vms.clone(), |_| true).await?;
            let each = async |id, etag| {
                let request = v1::DenyRequest {
                    id,
                    etag,
                    // For the VM that asks.
                    vms: None,
                    ..request.clone()
                };
                deny(request, &mut context.output).await
            };
            let summary = found.answer(&client, "denied", each).await?;
            return context.output.sum_up(&summary);
        }
        super::each(self.words, async |id| {
            let request = v1::DenyRequest {
                id,
                ..request.clone()
            };
            deny(request, &mut context.output).await
        })
        .await
    }
}

impl AllowArgs {
    /// Runs it.
    ///
    /// # Errors
    /// What makes no sense, and what the controlplane refuses.
    pub async fn execute(self, context: &mut Context) -> Result<(), Failure> {
        if !is_destination(&self.words) && self.words.len() == 1 {
            return Err(Failure::Usage(format!(
                "{:?} is not a destination (expected one as \"tcp 192.0.2.7:443\" or \"domain '*.example.com'\")\n  \
                 to answer a pending request: vnetctl approve {}",
                self.words[0], self.words[0]
            )));
        }
        let request = v1::CreateGrantRequest {
            action: v1::Action::Allow.into(),
            vms: self.vms.message(),
            lifetime: self.lifetime.message()?,
            budget: self.budget.message(),
            reason: self.reason.unwrap_or_default(),
            ..Default::default()
        };
        grant(&self.words, request, context).await
    }
}

impl AnswerArgs {
    fn check(&self, ids: usize) -> Result<(), Failure> {
        if self.etag.is_some() && ids > 1 {
            return Err(Failure::Usage(
                "--etag is of one request; answer one id at a time with it".to_owned(),
            ));
        }
        Ok(())
    }

    fn etag(&self) -> String {
        self.etag.clone().unwrap_or_default()
    }

    fn scope(&self) -> i32 {
        self.scope.map_or(v1::Scope::Unspecified, Into::into).into()
    }
}

fn answered(done: &str, request: Option<&v1::PendingRequest>, grant: Option<&v1::Grant>) -> String {
    let id = request.map_or("", |r| r.id.as_str());
    match grant {
        Some(grant) => format!("{done} {id}: {}", sentence(grant)),
        None => format!("{done} {id}"),
    }
}

/// Makes the grant of a request that has everything but what it is for.
async fn grant(
    destination: &[String],
    request: v1::CreateGrantRequest,
    context: &mut Context,
) -> Result<(), Failure> {
    let target = Target::from_words(destination).map_err(|e| Failure::Usage(e.to_string()))?;
    if request.action() == v1::Action::Allow
        && let Some(warning) = words::warning(&target)
    {
        output::say(warning);
    }
    let request = v1::CreateGrantRequest {
        target: Some((&target).into()),
        request_id: request_id()?,
        ..request
    };
    let client = context.connection.open().await?;
    let answer = client.grants().create_grant(unary(request)).await;
    let answer = answer.map_err(|status| refused(&status))?.into_inner();
    context.output.done("vnet.v1.CreateGrantResponse", &answer, || {
        let held = match answer.answered {
            0 => String::new(),
            1 => "; it answered 1 pending request".to_owned(),
            n => format!("; it answered {n} pending requests"),
        };
        let grant = answer.grant.clone().unwrap_or_default();
        format!("{}{held}{}", sentence(&grant), words::cut(answer.cut.as_ref()))
    })
}

/// A refusal; one for want of a VM says how to mean every VM.
fn refused(status: &tonic::Status) -> Failure {
    let text = describe(status);
    let reason = status.get_details_error_info().map(|info| info.reason);
    if reason.as_deref() != Some(NO_VM) {
        return Failure::Failed(text);
    }
    Failure::Failed(format!(
        "{text}\n  for every VM, those to come included: --all-vms; for one by its name: --vm NAME"
    ))
}

/// Whether the words are a destination rather than ids: what kind it is comes first, always.
fn is_destination(words: &[String]) -> bool {
    let first = words
        .first()
        .and_then(|w| w.split_whitespace().next())
        .unwrap_or_default();
    DESTINATION_KINDS.contains(&first)
}

/// Random, so that a call that is repeated after a lost answer makes one grant.
fn request_id() -> Result<String, Failure> {
    let random = getrandom::u64().map_err(|e| Failure::Failed(format!("no randomness to be had: {e}")))?;
    Ok(format!("{random:016x}"))
}

/// The `google.rpc.ErrorInfo` reason of a request that needs a VM when there is none.
const NO_VM: &str = "NO_VM";
const DESTINATION_KINDS: [&str; 8] = [
    "tcp", "udp", "icmp", "icmpv6", "any", "domain", "lookup", "forward",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_word_tells_a_destination_from_ids() {
        let words = |text: &[&str]| text.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();

        assert!(is_destination(&words(&["tcp", "192.0.2.7:443"])));
        assert!(is_destination(&words(&["domain *.example.com"])));
        assert!(!is_destination(&words(&["01JABC", "01JABD"])));
        assert!(!is_destination(&words(&["tcp1"])));
    }
}
