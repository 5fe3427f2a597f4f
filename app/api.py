"""The routes that change something, and one account as it stands: parse, call one service, shape the answer."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from structlog.contextvars import bind_contextvars

from app import errors, metrics, schemas
from app.booking import Booked
from app.routes import halting, health, history, margin_report
from app.routes.context import PROBLEMS, AccountPath, Services, ServicesDependency, json_response
from app.security import GuardedRoute, caller_of, needs
from app.services import reports
from app.services.trading import TradeOrder, TransferKind, TransferOrder

router = APIRouter(route_class=GuardedRoute)


@router.post(
    "/trade",
    summary="Book a trade",
    tags=["trading"],
    openapi_extra=needs("trade", account_keys=True),
    status_code=201,
    responses={
        201: {"model": schemas.TradeAnswer, "description": "Booked"},
        200: {"model": schemas.TradeAnswer, "description": "Booked before under this client_trade_id"},
        **PROBLEMS,
    },
)
async def post_trade(trade: schemas.TradeRequest, to: ServicesDependency, request: Request) -> Response:
    """Book a trade. No position is opened or increased without initial margin."""
    outcome = "unavailable"
    bind_contextvars(account_id=trade.account_id)
    try:
        caller_of(request).reach.require(trade.account_id)
        booked = await to.booking.book_trade(
            TradeOrder(
                account_id=trade.account_id,
                symbol=trade.symbol,
                side=trade.side,
                quantity=trade.quantity,
                price=trade.price,
            ),
            client_trade_id=trade.client_trade_id,
        )
        outcome = booked.outcome
    except (errors.Refusal, errors.UnknownAccount, errors.InvalidField):
        outcome = "refused"
        raise
    finally:
        metrics.TRADES.labels(trade.side, outcome).inc()
    return _booked(booked)


@router.post(
    "/mark-price",
    summary="Set a mark price",
    tags=["trading"],
    openapi_extra=needs("mark"),
    responses={200: {"model": schemas.MarkAnswer, "description": "Accepted"}, **PROBLEMS},
)
async def post_mark_price(mark: schemas.MarkRequest, to: ServicesDependency) -> Response:
    """Set the price at which open positions are valued; every accepted mark is swept."""
    return json_response(await to.booking.marks.set_mark(mark.symbol, mark.price, confirm=mark.confirm))


@router.post(
    "/accounts/{account_id}/deposit",
    summary="Deposit into an account",
    tags=["trading"],
    openapi_extra=needs("operate", account_keys=True),
    status_code=201,
    responses={
        201: {"model": schemas.TransferAnswer, "description": "Booked"},
        200: {"model": schemas.TransferAnswer, "description": "Booked before under this client_transfer_id"},
        **PROBLEMS,
    },
)
async def post_deposit(
    account_id: AccountPath, transfer: schemas.TransferRequest, to: ServicesDependency, request: Request
) -> Response:
    """Add USDT to an account; the first deposit makes the account."""
    bind_contextvars(account_id=account_id)
    caller_of(request).reach.require(account_id)
    return await _transfer("deposit", account_id, transfer, to)


@router.post(
    "/accounts/{account_id}/withdraw",
    summary="Withdraw from an account",
    tags=["trading"],
    openapi_extra=needs("operate", account_keys=True),
    status_code=201,
    responses={
        201: {"model": schemas.TransferAnswer, "description": "Booked"},
        200: {"model": schemas.TransferAnswer, "description": "Booked before under this client_transfer_id"},
        **PROBLEMS,
    },
)
async def post_withdraw(
    account_id: AccountPath, transfer: schemas.TransferRequest, to: ServicesDependency, request: Request
) -> Response:
    """Take USDT out of an account, at most ``min(balance, free margin)``."""
    bind_contextvars(account_id=account_id)
    caller_of(request).reach.require(account_id)
    return await _transfer("withdrawal", account_id, transfer, to)


async def _transfer(kind: TransferKind, account_id: str, transfer: schemas.TransferRequest, to: Services) -> Response:
    return _booked(
        await to.booking.book_transfer(
            TransferOrder(account_id=account_id, kind=kind, amount=transfer.amount),
            client_transfer_id=transfer.client_transfer_id,
        )
    )


def _booked(booked: Booked) -> Response:
    if booked.outcome == "replayed":
        return json_response(booked.answer, 200, {"Idempotency-Replayed": "true"})
    return json_response(booked.answer, 201)


@router.get(
    "/positions/{account_id}",
    summary="Show an account and its positions",
    tags=["risk"],
    openapi_extra=needs("read", account_keys=True),
    responses={
        200: {"model": schemas.AccountReport, "description": "The account at the live marks"},
        **{status: PROBLEMS[status] for status in (404, 422, 503)},
    },
)
async def get_positions(account_id: AccountPath, to: ServicesDependency, request: Request) -> Response:
    """One account, computed from its record and the live marks."""
    bind_contextvars(account_id=account_id)
    caller_of(request).reach.require(account_id)
    try:
        snapshot = await to.booking.read(account_id)
        account = to.booking.parse(snapshot)
    except errors.AccountQuarantined:
        return json_response({**reports.quarantined_summary(account_id), "positions": []})
    market = to.booking.market(snapshot)
    return json_response(
        reports.account_report(
            account,
            contracts=market.contracts,
            prices={symbol: mark.price for symbol, mark in market.marks.items()},
            breach=snapshot.breach,
            restore_at=to.settings.restore_at,
        )
    )


for resource in (margin_report, history, halting, health):
    router.include_router(resource.router)
