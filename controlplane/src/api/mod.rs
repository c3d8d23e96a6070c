//! The API: one file a service, each a thin layer between the contract's messages and the hub.
//!
//! Handlers read and check a request, call the hub once, wait (bounded) for what must be durable or
//! acknowledged, and answer. Refusals carry `google.rpc` details (see [`crate::refusal`]).

mod dns;
mod event;
mod flow;
mod forward;
mod grant;
mod pending;
mod policy;
mod vm;

#[cfg(test)]
mod tests;

use std::pin::Pin;
use std::sync::Arc;

use futures_util::Stream;
use tonic::{Request, Status};
use vnet_proto::model::VmSelector;
use vnet_proto::v1;

use crate::hub::Hub;
use crate::peer::Peer;
use crate::refusal::Refusal;
use crate::store::Durable;
use crate::watch::{Next, Watch};

/// Serves every service of the contract but the session.
#[derive(Debug, Clone)]
pub struct Api {
    hub: Arc<Hub>,
}

/// What a watch answers with.
pub type Changes<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Items on a page where the client does not say, and at most.
const PAGE_DEFAULT: usize = 100;
const PAGE_MAX: usize = 1_000;

impl Api {
    /// Over a hub.
    pub fn new(hub: Arc<Hub>) -> Self {
        Self { hub }
    }
}

/// Who calls, as the socket says.
fn actor<T>(request: &Request<T>) -> String {
    request
        .extensions()
        .get::<Peer>()
        .map_or_else(|| "unknown".to_owned(), |peer| peer.user.clone())
}

/// Which VMs; unset is all.
fn selector(message: Option<v1::VmSelector>) -> Result<Option<VmSelector>, Refusal> {
    Ok(message.map(VmSelector::try_from).transpose()?)
}

/// Waits until a change is saved.
async fn saved(durable: Durable) -> Result<(), Refusal> {
    durable.wait().await.map_err(|e| {
        Refusal::NotSaved(format!(
            "done, but not saved, so that a restart will not know of it: {e}"
        ))
    })
}

/// One page of items that are sorted by keys of text, and the token of the next.
///
/// The token is the last key shown: what came or went meanwhile repeats and hides nothing else.
fn page<T>(items: Vec<T>, page_size: u32, page_token: &str, key: impl Fn(&T) -> String) -> (Vec<T>, String) {
    let size = match page_size as usize {
        0 => PAGE_DEFAULT,
        size => size.min(PAGE_MAX),
    };
    let mut rest = items
        .into_iter()
        .filter(|item| page_token.is_empty() || key(item).as_str() > page_token);
    let shown: Vec<T> = rest.by_ref().take(size).collect();
    let token = match (shown.last(), rest.next()) {
        (Some(last), Some(_)) => key(last),
        _ => String::new(),
    };
    (shown, token)
}

/// A watch as a stream; `gap` makes what stands for missing changes.
fn stream<T: Clone + Send + Sync + 'static>(
    watch: Watch<T>,
    gap: impl Fn(u64) -> T + Send + 'static,
) -> Changes<T> {
    Box::pin(futures_util::stream::unfold(
        (watch, gap),
        |(mut watch, gap)| async move {
            let item = match watch.next().await {
                Next::Change(item) => item,
                Next::Gap(missed) => gap(missed),
                Next::Closed => return None,
            };
            Some((Ok(item), (watch, gap)))
        },
    ))
}

/// Refuses a budget: what cannot be enforced to its end is not accepted.
fn no_budget(budget: Option<v1::Budget>) -> Result<(), Refusal> {
    if budget.is_some_and(|b| b != v1::Budget::default()) {
        return Err(Refusal::NotBuilt {
            what: "a grant with a budget",
        });
    }
    Ok(())
}
