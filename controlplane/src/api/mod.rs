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
mod replay;
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
/// The token is the last key shown, below the name of its list: what came or went meanwhile repeats and hides
/// nothing else. One that this list cannot have given is refused rather than taken for a place in it.
fn page<T>(
    items: Vec<T>,
    page_size: u32,
    page_token: &str,
    keys: Keys,
    key: impl Fn(&T) -> String,
) -> Result<(Vec<T>, String), Refusal> {
    let size = match page_size as usize {
        0 => PAGE_DEFAULT,
        size => size.min(PAGE_MAX),
    };
    let after = keys.read(page_token)?;
    let mut rest = items
        .into_iter()
        .filter(|item| after.is_none_or(|after| key(item).as_str() > after));
    let shown: Vec<T> = rest.by_ref().take(size).collect();
    let token = match (shown.last(), rest.next()) {
        (Some(last), Some(_)) => keys.token(&key(last)),
        _ => String::new(),
    };
    Ok((shown, token))
}

/// A list's keys, so that a token is known for its own.
#[derive(Debug, Clone, Copy)]
struct Keys {
    /// The list's name.
    list: &'static str,
    /// Whether a text has the form of its keys.
    fits: fn(&str) -> bool,
}

impl Keys {
    fn token(self, key: &str) -> String {
        format!("{}:{key}", self.list)
    }

    /// The key after which a page begins; `None` is the first page.
    fn read(self, token: &str) -> Result<Option<&str>, Refusal> {
        if token.is_empty() {
            return Ok(None);
        }
        let key = token
            .strip_prefix(self.list)
            .and_then(|rest| rest.strip_prefix(':'));
        match key.filter(|key| (self.fits)(key)) {
            Some(key) => Ok(Some(key)),
            None => Err(not_a_token()),
        }
    }
}

fn not_a_token() -> Refusal {
    let text = "is not one that this list gave (expected a next_page_token, or none for the first page)";
    Refusal::field("page_token", text)
}

/// Whether a text is as many digits, as keys that are numbers have them.
fn is_number(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_digit())
}

/// Whether a text is a time, and an id that tells apart what happened at it: `SECONDS.NANOSECONDS.ID`.
fn is_time_and_id(text: &str) -> bool {
    let mut parts = text.splitn(3, '.');
    let mut next = || parts.next().unwrap_or_default();
    is_number(next(), 20) && is_number(next(), 9) && !next().is_empty()
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
