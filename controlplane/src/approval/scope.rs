//! Scopes: what may be answered to a request, and the target of the grant that each yields.

use crate::approval::{Request, Scope};

/// Scopes that an answer may have, narrowest first.
pub(crate) fn offered(_request: &Request) -> Vec<Scope> {
    unimplemented!()
}
